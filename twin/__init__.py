"""The physics of the ion memristor: atomic data, pulses, dynamics, memory, devices and loop metrics.

Import from the modules (`from twin.memristor import IonMemristor`); this package imports nothing by itself
and never changes JAX's global state. All solvers need 64-bit JAX.
"""
