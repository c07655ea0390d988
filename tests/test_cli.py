"""The console script: what it answers without JAX, its exit status, and what it leaves behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "experiments" / "configs" / "demo.toml"
VERBS = ("simulate", "fit", "optimize", "sweep", "report", "reproduce", "doctor", "track", "predict", "compare",
         "transfer")  # fmt: skip
HEAVY = ("jax", "equinox", "diffrax", "matplotlib", "xarray", "pandas", "zarr", "scipy")
BOUND_S = 1.5  # of a refusal; the help of the program itself is held to 0.5 s below

# The program with a list of the heavy packages it imported, on the last line of stderr.
WATCHED = f"""
import sys
from experiments.cli import main
try:
    main(sys.argv[1:])
finally:
    print("imported:", *[name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)
"""

# The program with pipelines replaced by ones that behave as named in the environment.
STAGED = """
import os, signal, sys, time, types

# A shell that starts a job in the background has it ignore SIGINT, and so all that this job starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

def behave(out):
    print("chatter of a pipeline")
    how = os.environ["HOW"]
    if how == "late":
        raise ValueError("the pulses overlap too much; use engine = 'lindblad'.")
    if how == "broken":
        raise RuntimeError("the solver gave up\\nat a place")
    if how == "interrupt":
        raise KeyboardInterrupt
    if how == "bug":
        raise KeyError("a mistake of ours")
    if how == "wait":
        print("waiting", file=sys.stderr, flush=True)
        time.sleep(60)
    status = "not converged: the line search failed" if how == "unconverged" else "converged"
    if out is not None:
        out.write_result({"status": status, "seed": SEED[0]})
    return {"status": status, "std": float("nan")}

SEED = []

def stage(name, function, call):
    module = types.ModuleType(f"experiments.{name}")
    setattr(module, function, call)
    sys.modules[module.__name__] = module

def with_seed(seed, out):
    SEED.append(seed)
    return behave(out)

stage("simulate", "run", lambda config, out, seed: with_seed(seed, out))
stage("calibrate", "run", lambda config, table, out, seed: with_seed(seed + 0 * len(table), out))
stage("optimize", "run", lambda config, fit_run, out, seed: with_seed(seed, out))
stage("sweep", "run", lambda config, store, seed, workers, scheduler: with_seed(seed, None))
stage("report", "rewrite", lambda run: behave(None))
stage("doctor", "run", lambda: behave(None))
outside = os.environ["HOW"] == "outside"
stage("reproduce", "run", lambda name: {
    "status": "failed: 1 of 1 numbers are outside their tolerance" if outside else "done", "notes": ["mind this"],
    "rows": [{"name": name, "quantity": "y", "origin": "exact", "relation": "<", "expected": 0.42, "obtained": 0.42,
              "tolerance": 0.0, "verdict": "fail" if outside else "pass"}]})
def into(name, out):
    with_seed(0, out)
    return sys.modules["experiments.reproduce"].run(name)

sys.modules["experiments.reproduce"].run_into = into
from experiments.cli import main
main(sys.argv[1:])
"""


def run(*arguments: object, code: str = WATCHED, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


def staged(how: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return run(*arguments, code=STAGED, HOW=how, **environment)


def fastest(*arguments: object) -> tuple[float, subprocess.CompletedProcess[str]]:
    """The best of five runs: what the program needs, not what its neighbours on the machine take."""
    best, done = float("inf"), None
    for _ in range(5):
        start = time.perf_counter()
        command = [sys.executable, "-m", "experiments", *map(str, arguments)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        best = min(best, time.perf_counter() - start)
    assert done is not None
    return best, done


def test_help_is_fast():
    seconds, done = fastest("--help")
    assert done.returncode == 0
    for verb in (
        "simulate",
        "fit",
        "optimize",
        "sweep",
        "report",
        "reproduce",
        "doctor",
        "track",
        "predict",
        "compare",
    ):
        assert f"\n  {verb} " in done.stdout
    assert "JAX_COMPILATION_CACHE_DIR" in done.stdout
    assert seconds < 0.5


def test_refusals_are_fast(tmp_path):
    table = tmp_path / "bad.csv"
    table.write_text("cycle,x_set,shots,n_y\n0,2,9,1\n")
    for arguments in (
        ("fit", DEMO, "--out", tmp_path / "run", "--set", "device.sigma_1_us=20"),
        ("fit", DEMO, "--out", tmp_path / "run", "--data", table),
    ):
        seconds, done = fastest(*arguments)
        assert done.returncode == 2
        assert seconds < BOUND_S


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["--schema"], *([verb, "--help"] for verb in VERBS)])
def test_answers_without_importing_jax(arguments):
    done = run(*arguments)
    assert done.returncode == 0
    assert done.stdout.strip()
    assert done.stderr.splitlines()[-1] == "imported:"


def test_the_help_of_fit_tells_its_tables():
    text = run("fit", "--help").stdout
    for part in (
        "[device]:",
        "[memory]:",
        "[data]:",
        "[fit]:",
        "sigma_1_s = 2e-05",
        "1e-08 to",
        "starts = 16",
        "--data",
    ):
        assert part in text
    assert "[sweep]" not in text


def test_the_schema_is_json():
    assert json.loads(run("--schema").stdout)["title"] == "Config"


@pytest.fixture
def bad(tmp_path: Path) -> dict[str, Path]:
    """Files that must be refused, outside the folder in which nothing may appear."""
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    paths = {name: inputs / name for name in ("counts.csv", "binary.csv", "no.toml", "empty.toml", "held", "failed")}
    paths["counts.csv"].write_text("cycle,x_set,shots,n_x,n_y\n0,0,9,0,10\n")
    paths["binary.csv"].write_bytes(b"\x89HDF\r\n")
    paths["no.toml"].write_text("[device\n")
    paths["empty.toml"].write_text("")
    for name in ("held", "failed"):
        paths[name].mkdir()
        (paths[name] / "config.toml").write_text("")
        (paths[name] / "result.json").write_text("{}")
    return paths


CASES = [  # arguments with names of bad files in braces, parts of the message
    (["fit", "{demo}"], ["Missing option '--out'"]),
    (["fit", "--out", "{out}"], ["Missing argument 'CONFIG'"]),
    (["fitt"], ["No such command 'fitt'"]),
    (["fit", "{demo}", "--out", "{out}", "--sed", "1"], ["No such option", "--sed"]),
    (["fit", "{demo}", "--out", "{out}", "--seed", "x"], ["'--seed'", "'x'"]),
    (["fit", "{demo}", "--out", "{out}", "--seed", "-1"], ["fit.seed is -1"]),
    (["fit", "absent.toml", "--out", "{out}"], ["absent.toml: there is no such file"]),
    (["fit", "{no.toml}", "--out", "{out}"], ["not valid TOML", "line 1"]),
    (["fit", "{empty.toml}", "--out", "{out}"], ["the table [data] is missing"]),
    (["simulate", "{demo}", "--out", "{out}"], ["the table [simulate] is missing"]),
    (["sweep", "{demo}", "--out", "{out}"], ["the table [sweep] is missing"]),
    (["optimize", "{empty.toml}", "--out", "{out}"], ["the table [optimize] is missing"]),
    (["fit", "{demo}", "--out", "{out}", "--set", "device.sigma_1_s=-1"], ["device.sigma_1_s is -1"]),
    (["fit", "{demo}", "--out", "{out}", "--set", "memory.window_cycles=0"], ["memory.window_cycles is 0"]),
    (["optimize", "{demo}", "--out", "{out}", "--set", "device.separation_s=0"], ["optimize.bounds.separation_s"]),
    (["fit", "{demo}", "--out", "{out}", "--data", "{counts.csv}"], ["line 2, column n_y is 10"]),
    (["fit", "{demo}", "--out", "{out}", "--data", "{binary.csv}"], ["HDF5", "damaged"]),
    (["fit", "{demo}", "--out", "{out}", "--data", "absent.csv"], ["absent.csv: there is no such file"]),
    (["fit", "{demo}", "--out", "{held}"], ["already holds a run"]),
    (["simulate", "{simulate}", "--out", "{held}"], ["already holds a run"]),
    (["sweep", "{sweep}", "--out", "{held}"], ["already holds a run"]),
    (["fit", "{demo}", "--out", "{no.toml}"], ["this is a file"]),
    (["fit", "{demo}", "--out", "{no.toml}/run"], ["is not a folder"]),
    (["fit", "{demo}", "--out", "/proc/none/run"], ["/proc/none/run", "cannot be written"]),
    (["optimize", "{demo}", "--from", "{failed}", "--out", "{out}"], ["this run is no fit with parameters"]),
    (["optimize", "{demo}", "--from", "absent", "--out", "{out}"], ["absent: this is no run folder"]),
    (["report", "absent"], ["absent: this is no run folder"]),
    (["track", "{demo}", "--from", "{failed}", "--out", "{out}", "x.csv"], ["this run is no fit with parameters"]),
    (["track", "{demo}", "--from", "absent", "--out", "{out}", "x.csv"], ["absent: this is no run folder"]),
    (["track", "{demo}", "x.csv", "--out", "{out}"], ["Missing option '--from'"]),
    (["predict", "absent", "--out", "{out}"], ["either a configuration"]),
    (["compare", "absent", "absent"], ["Missing argument 'TABLES...'"]),
    (["compare", "absent", "absent", "{counts.csv}"], ["line 2, column n_y is 10"]),
]


@pytest.mark.parametrize(("arguments", "parts"), CASES, ids=[" ".join(arguments) for arguments, _ in CASES])
def test_wrong_input_is_one_sentence_exit_2_and_nothing_written(tmp_path, bad, arguments, parts):
    names = {name: str(path) for name, path in bad.items()} | {"demo": str(DEMO), "out": str(tmp_path / "new" / "run")}
    names |= {name: str(DEMO.with_name(f"{name}.toml")) for name in ("simulate", "sweep")}
    for name, path in names.items():
        arguments = [argument.replace(f"{{{name}}}", path) for argument in arguments]
    before = sorted(tmp_path.rglob("*"))
    done = run(*arguments)
    message, imported = done.stderr.splitlines()
    assert done.returncode == 2
    assert done.stdout == ""
    assert message.startswith("iontwin: ")
    for part in parts:
        assert part in message
    assert imported == "imported:"
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("value", ["0", "false", "off", "F", "maybe"])
def test_64_bit_switched_off_is_refused(tmp_path, value):
    done = staged("fine", "fit", DEMO, "--out", tmp_path / "new" / "run", JAX_ENABLE_X64=value)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"iontwin: JAX_ENABLE_X64 is '{value}'")
    assert list(tmp_path.iterdir()) == []
    assert run("fit", "--help", JAX_ENABLE_X64=value).returncode == 0


def test_a_run_leaves_its_folder_and_prints_one_json_object(tmp_path):
    out = tmp_path / "run"
    done = staged("fine", "fit", DEMO, "--out", out, "--seed", 7, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"status": "converged", "std": None, "not_finite": {"std": "not a number"}}
    assert "chatter of a pipeline" in done.stderr
    assert f"written to {out}" in done.stderr
    assert json.loads((out / "result.json").read_text()) == {"status": "converged", "seed": 7}
    assert "[fit.free]" in (out / "config.toml").read_text()
    assert "seed = 7" in (out / "config.toml").read_text()
    assert staged("fine", "fit", DEMO, "--out", out).returncode == 2
    done = staged("fine", "fit", DEMO, "--out", out, "--seed", 8, "--replace")
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "result.json").read_text()) == {"status": "converged", "seed": 8}


@pytest.mark.parametrize("verb", ["simulate", "fit", "optimize", "sweep"])
def test_every_verb_hands_its_pipeline_what_it_validated(tmp_path, verb):
    config = DEMO if verb == "fit" else DEMO.with_name(f"{verb}.toml")
    done = staged("fine", verb, config, "--out", tmp_path / "run", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["status"] == "converged"


def test_a_fit_that_does_not_converge_keeps_its_folder_and_exits_1(tmp_path):
    out = tmp_path / "run"
    done = staged("unconverged", "fit", DEMO, "--out", out)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "iontwin: not converged: the line search failed"
    assert json.loads((out / "result.json").read_text())["status"] == "not converged: the line search failed"


def test_a_run_that_fails_keeps_its_folder_with_the_reason(tmp_path):
    out = tmp_path / "run"
    done = staged("broken", "fit", DEMO, "--out", out)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"iontwin: the solver gave up (see {out})"
    assert "Traceback" not in done.stderr
    assert json.loads((out / "result.json").read_text()) == {"status": "failed: the solver gave up\nat a place"}
    assert "the solver gave up" in (out / "log.txt").read_text()


def test_a_user_error_found_late_exits_2_and_leaves_nothing(tmp_path):
    done = staged("late", "simulate", DEMO.with_name("simulate.toml"), "--out", tmp_path / "run")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("iontwin: the pulses overlap too much")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
    shown = staged("late", "doctor", IONTWIN_TRACEBACK="1")
    assert "Traceback" in shown.stderr


def test_a_mistake_of_ours_is_shown_in_full_and_leaves_nothing(tmp_path):
    done = staged("bug", "fit", DEMO, "--out", tmp_path / "run")
    assert done.returncode == 1
    assert "KeyError: 'a mistake of ours'" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_run_exits_130_and_leaves_nothing(tmp_path):
    done = staged("interrupt", "fit", DEMO, "--out", tmp_path / "run")
    assert done.returncode == 130
    assert done.stderr.splitlines()[-1] == "iontwin: interrupted."
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_told_to_stop_leaves_nothing(tmp_path, number, status):
    command = [sys.executable, "-c", STAGED, "fit", str(DEMO), "--out", str(tmp_path / "run")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HOW": "wait"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while (line := process.stderr.readline()) and "waiting" not in line:
            continue
        assert list(tmp_path.iterdir()) != []
        process.send_signal(number)
        assert process.wait(timeout=30) == status
    assert list(tmp_path.iterdir()) == []


def test_reproduced_numbers_are_a_table_and_a_verdict():
    done = staged("fine", "reproduce", "x4")
    assert done.returncode == 0
    assert done.stdout.splitlines()[0].split() == [
        "name",
        "quantity",
        "origin",
        "expected",
        "obtained",
        "tolerance",
        "verdict",
    ]
    assert done.stdout.splitlines()[1].split() == ["x4", "y", "exact", "<", "0.42", "0.42", "0", "pass"]
    done = staged("outside", "reproduce", "x4", "--json")
    assert done.returncode == 1
    answer = json.loads(done.stdout)
    assert answer["notes"] == ["mind this"]
    row = answer["rows"][0]
    assert (row["relation"], row["expected"], row["verdict"]) == ("<", 0.42, "fail")
    assert "1 of 1 numbers" in done.stderr


def test_reproduced_numbers_leave_a_run_folder_where_asked(tmp_path):
    out = tmp_path / "run"
    done = staged("fine", "reproduce", "x4", "--out", out)
    assert done.returncode == 0, done.stderr
    assert {entry.name for entry in out.iterdir()} >= {"config.toml", "result.json", "figures"}
    assert staged("fine", "reproduce", "x4", "--out", out).returncode == 2
    assert staged("fine", "reproduce", "x4", "--out", out, "--replace").returncode == 0


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("merlin-narmas", "did you mean merlin-narma?"),
        ("X4", "did you mean x4?"),
        ("pulses", "known names are separated-pulses, simultaneous-pulses, photonic-loop, crossed-pair, merlin-narma"),
    ],
)
def test_an_unknown_name_to_reproduce_is_refused_without_jax(name, said):
    done = run("reproduce", name)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.splitlines()[-1].split() == ["imported:"]


def test_a_report_is_written_for_a_run_folder_only(tmp_path):
    out = tmp_path / "run"
    staged("fine", "fit", DEMO, "--out", out)
    done = staged("fine", "report", out, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["report"] == str(out / "report.html")


def test_jax_is_told_about_precision_and_cache_before_it_is_imported(tmp_path):
    code = (
        "import sys, types, experiments; module = types.ModuleType('experiments.doctor')\n"
        "def run():\n"
        "    import jax\n"
        "    return {'x64': jax.config.jax_enable_x64, 'cache': jax.config.jax_compilation_cache_dir,\n"
        "            'least': jax.config.jax_persistent_cache_min_compile_time_secs}\n"
        "module.run = run; sys.modules['experiments.doctor'] = module\n"
        "from experiments.cli import main\n"
        "main(['doctor', '--json'])\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    environment |= {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {"x64": True, "cache": str(tmp_path / "iontwin" / "jax"), "least": 0.0}
    environment["JAX_COMPILATION_CACHE_DIR"] = "elsewhere"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["cache"] == "elsewhere"


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import experiments, sys; print('jax' in sys.modules)", "False"),
        ("import jax, experiments; print(jax.config.jax_enable_x64)", "True"),
        ("import experiments, jax; print(jax.config.jax_enable_x64)", "True"),
    ],
)
def test_importing_the_package_turns_on_64_bit_without_importing_jax(code, expected):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    done = subprocess.run([sys.executable, "-c", code], env={**environment, "PYTHONPATH": str(ROOT)}, check=True,
                          capture_output=True, text=True)  # fmt: skip
    assert done.stdout.strip() == expected
