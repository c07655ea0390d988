"""The configuration as classes: a table is a class, a key is a field with its unit, range and default.

The device, its memory and its data are in `experiments.schema_device`; here is what the verbs read.
"""

import math
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, StringConstraints, model_validator

from experiments.messages import Refusal
from experiments.schema_control import Hardware, Optimize
from experiments.schema_device import (
    FREE,
    PARAMETERS,
    TUNING,
    Axis,
    Box,
    Data,
    Device,
    Memory,
    Table,
    foreign,
    from_list,
    named,
    number,
    within,
)
from experiments.schema_transfer import Transfer, check_movable, ignored_by_closed_form
from experiments.schema_trap import Chain, Crosstalk, Motion, Trap

_SEED = 2**63 - 1
_LARGEST_SWEEP = 10_000_000


class Fit(Table):
    """Calibration: which parameters are free and how the search is made."""

    free: Annotated[dict[str, Box], within(FREE)] = named(
        FREE, "at least one free parameter as name = [low, high], its prior box, from which starts are drawn"
    )
    per_table: list[str] = Field(
        [], description="free parameters of which each loop table has its own, NAME@TABLE in the result"
    )
    per_ion: list[str] = Field(
        [], description="free parameters of which each ion of a register has its own, NAME@LOOP in the result"
    )
    noise: Literal["binomial", "beta_binomial", "outliers", "student_t"] = Field(
        "binomial",
        description="scatter of the data: projection noise (Gaussian for values), probabilities that fluctuate from "
        "row to row (free `overdispersion`), a share of arbitrary cells (`outlier_share`), or heavy tails",
    )
    optimizer: Literal["adam+lbfgs", "levenberg_marquardt"] = Field(
        "adam+lbfgs", description="search: Adam then L-BFGS for any noise, or Levenberg-Marquardt for binomial"
    )
    starts: int = number(16, 1, 4096, "", "starts of the search")
    sampling: Literal["random", "sobol"] = Field("random", description="starts drawn from the boxes, or spread over")
    seed: int = number(0, 0, _SEED, "", "seed of the starts")

    @model_validator(mode="after")
    def _consistent(self) -> "Fit":
        for k, name in enumerate(self.per_table):
            if name not in self.free:
                raise Refusal(f"per_table.{k}", f"is '{name}', which is not free; give it a box in fit.free")
        for k, name in enumerate(self.per_ion):
            if name not in self.free:
                raise Refusal(f"per_ion.{k}", f"is '{name}', which is not free; give it a box in fit.free")
        for name, law in (("overdispersion", "beta_binomial"), ("outlier_share", "outliers")):
            if name in self.free and self.noise != law:
                reason = f"has no meaning for fit.noise = '{self.noise}'; choose noise = '{law}', or remove it"
                raise Refusal(f"free.{name}", reason)
        if self.optimizer == "levenberg_marquardt" and self.noise != "binomial":
            raise Refusal("optimizer", f"is 'levenberg_marquardt', which cannot serve noise = '{self.noise}'; "
                          "choose 'adam+lbfgs'")  # fmt: skip
        return self


class Uncertainty(Table):
    """Intervals beyond the Fisher matrix, made after a fit; what is not asked for is not made."""

    profile: list[str] = Field([], description="parameters whose likelihood is profiled; ['all'] for all")
    posterior: bool = Field(False, description="whether the posterior is sampled (NUTS)")
    chains: int = number(4, 2, 64, "", "chains of the sampler")
    draws: int = number(1000, 100, 1_000_000, "", "draws of each chain")
    warmup: int = number(600, 100, 100_000, "", "steps of each chain that adapt the sampler")
    bootstrap: int = number(0, 0, 100_000, "", "refits of simulated tables (parametric bootstrap)")
    seed: int = number(0, 0, _SEED, "", "seed of draws and simulated tables")


class Coverage(Table):
    """Simulation-based calibration of intervals; the truth is [device], the design [simulate]."""

    tables: int = number(2000, 0, 1_000_000, "", "tables simulated at the truth, for Laplace and profile intervals")
    profile: bool = Field(True, description="whether likelihoods are profiled as well")
    ranks: int = number(0, 0, 100_000, "", "tables whose truth is drawn from the prior, for ranks of the posterior")
    seed: int = number(0, 0, _SEED, "", "seed of all counts")


class Design(Table):
    """The next measurement: loops of every combination of what is listed are judged."""

    target: str = Field(min_length=1, description="free parameter of the fit whose uncertainty is to shrink")
    window_cycles: list[float] = Field([5.0, 10.0, 20.0], min_length=1, description="memory windows, cycles")
    cycles_per_period: list[int] = Field([20, 40], min_length=1, description="periods of the input, cycles")
    cycles: int = number(80, 8, 100_000, "", "cycles of a loop, as whole periods that fit into it")
    offsets_hz: list[Annotated[tuple[float, float], BeforeValidator(from_list)]] = Field(
        [(0.0, 0.0), (3e3, -3e3), (-3e3, 3e3)], min_length=1, description="pairs of laser offsets, Hz"
    )
    amplitudes: list[float] = Field([1.0, 0.6], min_length=1, description="largest commanded inputs, above 0 to 1")
    shots: list[int] = Field([200], min_length=1, description="repetitions of each setting")
    shot_s: float = number(5e-3, 1e-6, 1e3, "s", "time of one shot: cooling, preparation, pulses, detection")
    overhead_s: float = number(60.0, 0.0, 1e6, "s", "time to set up a loop")
    most_minutes: float = number(1e6, 1e-3, 1e6, "min", "longest loop that is considered")
    verify: int = number(0, 0, 100_000, "", "simulations that check the forecast for the best loop and a random one")
    seed: int = number(0, 0, _SEED, "", "seed of the simulations")

    @model_validator(mode="after")
    def _sensible(self) -> "Design":
        for name, low, high in (("window_cycles", 1, 1e6), ("cycles_per_period", 4, self.cycles), ("shots", 1, 1e9)):
            for k, value in enumerate(getattr(self, name)):
                if not low <= value <= high:
                    raise Refusal(f"{name}.{k}", f"is {value:g}, but must lie between {low:g} and {high:g}")
        for k, value in enumerate(self.amplitudes):
            if not 0 < value <= 1:
                raise Refusal(f"amplitudes.{k}", f"is {value:g}, but must lie above 0 and be at most 1")
        return self


class Loop(Table):
    """A loop to run: x_set of cycle k is (1 - cos(2 pi k / cycles_per_period)) / 2."""

    label: Annotated[str, StringConstraints(pattern=r"^[^\s#,\"\x00-\x1f][^,\"\x00-\x1f]*$")] = Field(
        "A", description="label of the loop in the table: text without commas or quotes"
    )
    periods: int = number(3, 1, 10_000, "", "periods of the input")
    cycles_per_period: int = number(40, 4, 100_000, "", "cycles in one period of the input")
    window_cycles: float | None = number(None, 1.0, 1e6, "cycles", "memory window (default: that of [memory])")
    delay_cycles: float = number(0.0, 0.0, 1e6, "cycles", "how far the input lags behind; of a register's ion, say")
    detuning_1_set_hz: float = number(0.0, -TUNING, TUNING, "Hz", "known offset of laser 1, laser minus line")
    detuning_2_set_hz: float = number(0.0, -TUNING, TUNING, "Hz", "known offset of laser 2, laser minus line")
    shots: int = number(0, 0, 10**9, "", "repetitions of each cycle; 0 gives probabilities without shot noise")


class Simulate(Table):
    """One or more loops of the device."""

    loops: list[Loop] = Field(min_length=1, description="at least one loop, [[simulate.loops]] each")
    seed: int = number(0, 0, _SEED, "", "seed of the shot noise")

    @model_validator(mode="after")
    def _distinct(self) -> "Simulate":
        labels = [loop.label for loop in self.loops]
        for k, label in enumerate(labels):
            if label in labels[:k]:
                raise Refusal(f"loops.{k}.label", f"is {label!r} again; give each loop its own label")
        return self


class Sweep(Table):
    """Loops over a grid, or over a random, Sobol or Latin-hypercube set, of named parameters."""

    parameters: Annotated[dict[str, Axis], within(PARAMETERS)] = named(
        PARAMETERS, "at least one parameter as name = [low, high] or {low, high, points}, over [device] and the loop"
    )
    design: Literal["grid", "random", "sobol", "latin_hypercube"] = Field(
        "grid", description="full grid, uniformly random points, scrambled Sobol set or Latin hypercube"
    )
    points: int = number(11, 1, _LARGEST_SWEEP, "", "points of each axis of a grid, or of the whole set")
    seed: int = number(0, 0, _SEED, "", "seed of the set and of the shot noise")
    memory_mb: float = number(
        2048.0, 1.0, 1e9, "MB", "memory that one process may take; on a GPU, what a chunk may take of its memory"
    )
    chunk: int | None = number(
        None, 1, 1_000_000, "", "points computed in one call and stored together (default: what memory_mb allows, "
        "at most 4096 and about a 64th of the sweep)",
    )  # fmt: skip
    loop: Loop = Field(Loop(), description="the loop that is run at every point")

    @model_validator(mode="after")
    def _size(self) -> "Sweep":
        if self.design == "grid":
            total = math.prod(axis.points or self.points for axis in self.parameters.values())
            if total > _LARGEST_SWEEP:
                raise Refusal("points", f"gives a grid of {total} points, but at most {_LARGEST_SWEEP} are allowed")
        for name, axis in self.parameters.items():
            if self.design != "grid" and axis.points is not None:
                raise Refusal(f"parameters.{name}.points", f"belongs to a grid; design = '{self.design}' takes "
                              "sweep.points; remove it")  # fmt: skip
        return self


class Config(Table):
    """The tables of a run."""

    device: Device = Field(default_factory=lambda: Device.model_validate({}), description="the memristor")
    memory: Memory = Field(Memory(), description="the feedback")
    data: Data | None = Field(None, description="the recorded loops")
    fit: Fit | None = Field(None, description="calibration")
    uncertainty: Uncertainty = Field(Uncertainty(), description="intervals beyond the Fisher matrix")
    coverage: Coverage | None = Field(None, description="calibration of intervals")
    design: Design | None = Field(None, description="the next measurement")
    simulate: Simulate | None = Field(None, description="loops to run")
    optimize: Optimize | None = Field(None, description="pulse design")
    hardware: Hardware | None = Field(None, description="what generator and modulator allow")
    sweep: Sweep | None = Field(None, description="batches")
    transfer: Transfer | None = Field(None, description="a move to the other platform")
    trap: Trap | None = Field(None, description="the Paul trap")
    chain: Chain | None = Field(None, description="the ions in it")
    motion: Motion | None = Field(None, description="the beams, and what they see of the motion")
    crosstalk: Crosstalk | None = Field(None, description="light at the neighbours of a register's ions")

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        free = {"fit.free": self.fit.free if self.fit else {}, "sweep.parameters": {}}
        if self.transfer and self.transfer.to != self.device.platform:
            free["transfer.source"] = self.transfer.source
        if self.sweep:
            free["sweep.parameters"] = self.sweep.parameters
        for path, names in free.items():
            for name in names:
                if reason := self._unusable(name):
                    raise Refusal(f"{path}.{name}", reason)
        self._trap_fits()
        if self.transfer and self.transfer.to == self.device.platform:
            raise Refusal(
                "transfer.to", f"is '{self.transfer.to}', which device.platform is as well; name the other one"
            )
        if self.transfer:
            check_movable(self.transfer, self.device, self.memory)
        if self.transfer and self.device.engine == "closed_form":
            here = "source" if self.transfer.to == "photonic" else "target"
            heated = here == "source" and self.device.heating_rate_per_s > 0
            for name in getattr(self.transfer, here):
                if ignored_by_closed_form(name, heated):
                    raise Refusal(f"transfer.{here}.{name}", "is ignored by device.engine = 'closed_form'; remove it, "
                                  "or choose 'lindblad'")  # fmt: skip
        noisy = max(self.device.detuning_noise_1_hz, self.device.detuning_noise_2_hz) > 0
        if noisy and self.device.engine == "closed_form":
            raise Refusal("device.engine", "is 'closed_form', which knows no detuning noise; choose 'lindblad'")
        if self.fit and self.fit.per_ion and not self.register_of:
            raise Refusal("fit.per_ion", "needs the ions of a register; add [chain] with memristors = 'all'")
        if self.data and self.register_of and self.data.scans:
            raise Refusal("data.scans", "are made for one memristor; set chain.memristors = 'one', or remove them")
        if self.data and self.data.scans and self.device.platform == "photonic":
            raise Refusal("data.scans", "are measured on an ion, but device.platform is 'photonic'; remove them")
        for k, name in enumerate(self.uncertainty.profile):
            base, at, part = name.partition("@")
            if self.fit and name != "all" and base not in self.fit.free:
                raise Refusal(f"uncertainty.profile.{k}", f"is '{name}', which is not free; name a key of fit.free")
            loops = [self.data.name, *self.data.more] if self.data else []
            if self.fit and at and (base not in self.fit.per_table or part not in loops or len(loops) < 2):
                reason = (
                    f"is '{name}', but no table has its own {base} under that name; see fit.per_table and data.more"
                )
                raise Refusal(f"uncertainty.profile.{k}", reason)
        if self.optimize is None:
            return self
        if self.device.platform == "photonic":
            raise Refusal("optimize", "designs laser pulses, but device.platform is 'photonic'; choose 'ion'")
        if self.optimize.shape is not None and self.hardware is None:
            raise Refusal("hardware", "is missing, which sampled pulses need; add a table [hardware], or leave "
                          "[optimize.shape] out")  # fmt: skip
        for name, (low, high) in self.optimize.bounds.items():
            start = 1.0 if name.startswith("amplitude") else getattr(self.device, name, 0.0)
            if not low <= start <= high:
                whose = f"device.{name}" if name in Device.model_fields else "the command the search starts from"
                reason = f"is [{low:g}, {high:g}], but {whose} is {start:g}, outside it; move the bounds or the device"
                raise Refusal(f"optimize.bounds.{name}", reason)
        return self

    @property
    def loops(self) -> list[Loop]:
        """The loops of [simulate]; of a register one for each ion, labelled by its number if one was given for all."""
        loops = list(self.simulate.loops) if self.simulate is not None else []
        if self.register_of and len(loops) == 1:
            lag = loops[0].delay_cycles
            loops = [
                loops[0].model_copy(update={"label": f"{loops[0].label} {k + 1}", "delay_cycles": k * lag})
                for k in range(self.register_of)
            ]
        return loops

    @property
    def register_of(self) -> int:
        """Number of ions of a register; 0 for a single memristor."""
        return self.chain.ions if self.chain is not None and self.chain.memristors == "all" else 0

    def _trap_fits(self) -> None:
        """Refuses tables of the trap that contradict each other or the device."""
        given = [name for name in ("trap", "chain", "motion", "crosstalk") if getattr(self, name) is not None]
        if given and self.device.platform == "photonic":
            raise Refusal(given[0], "has no meaning for device.platform = 'photonic'; remove it")
        for name in given:
            if name in ("chain", "motion") and self.trap is None:
                raise Refusal("trap", f"is missing, which [{name}] needs; add a table [trap]")
        if self.crosstalk is not None and not self.register_of:
            raise Refusal("crosstalk", "needs the ions of a register; add [chain] with memristors = 'all'")
        if self.crosstalk is not None and self.crosstalk.pointing_m is not None:
            if len(self.crosstalk.pointing_m) != self.register_of:
                reason = f"has {len(self.crosstalk.pointing_m)} numbers, but the chain has {self.register_of} ions"
                raise Refusal("crosstalk.pointing_m", reason)
        if self.trap is None:
            return
        for name in ("eta_1", "eta_2"):
            if getattr(self.device, name) > 0:
                raise Refusal(f"device.{name}", "is given, but [trap] and [motion] tell it; remove either")
        if self.trap.field_noise_v2_per_m2_hz > 0 and self.device.heating_rate_per_s > 0:
            raise Refusal("device.heating_rate_per_s", "is given beside trap.field_noise_v2_per_m2_hz; remove either")
        loops = self.simulate.loops if self.simulate is not None and self.register_of else []
        if loops and len(loops) not in (1, self.register_of):
            reason = (
                f"has {len(loops)} loops, but a register of {self.register_of} ions takes one for all or one for each"
            )
            raise Refusal("simulate.loops", reason)
        for key in ("periods", "cycles_per_period", "shots"):
            if len({getattr(loop, key) for loop in loops}) > 1:
                raise Refusal(f"simulate.loops.{key}", "differs from loop to loop, but the ions play at the same time")
        for verb in ("sweep", "optimize", "design", "coverage", "transfer"):
            if self.register_of and getattr(self, verb) is not None:
                raise Refusal(f"{verb}", "is made for one memristor; set chain.memristors = 'one'")

    def _unusable(self, name: str) -> str:
        """Why a parameter has no meaning for this device; empty when it has one."""
        if reason := foreign(name, self.device.platform):
            return reason
        if name.startswith("crosstalk") and not self.register_of:
            return "belongs to a register; add [chain] with memristors = 'all'"
        if name in ("eta_1", "eta_2") and self.trap is not None:
            return "follows from [trap] and [motion]; remove it"
        two = self.device.laser_linewidth_hz is None
        if name == "laser_linewidth_hz" and two:
            return "belongs to one source, but [device] has two; name laser_linewidth_1_hz or laser_linewidth_2_hz"
        if name in ("laser_linewidth_1_hz", "laser_linewidth_2_hz") and not two:
            return "belongs to two sources; give both linewidths in [device], or name laser_linewidth_hz"
        return ""

    def seed_of(self, verb: str) -> int:
        """Seed in the table of a verb that has one: "simulate", "fit", "optimize" or "sweep"."""
        return getattr(self, verb).seed

    def to_toml(self) -> str:
        """The resolved configuration; reading it again gives an equal one."""
        import tomli_w

        return tomli_w.dumps(self.model_dump(exclude_none=True))


TABLES: dict[str, type[Table]] = {
    "device": Device,
    "memory": Memory,
    "data": Data,
    "fit": Fit,
    "uncertainty": Uncertainty,
    "coverage": Coverage,
    "design": Design,
    "simulate": Simulate,
    "optimize": Optimize,
    "hardware": Hardware,
    "sweep": Sweep,
    "transfer": Transfer,
    "trap": Trap,
    "chain": Chain,
    "motion": Motion,
    "crosstalk": Crosstalk,
}
"""The tables of a configuration by name."""
