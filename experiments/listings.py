"""Tables of results for people: cells as text, for reports and for the terminal."""

from collections.abc import Iterator, Mapping
from typing import Any

from experiments.reproduced import shown

Rows = list[dict[str, Any]]


def listing(result: Mapping[str, Any]) -> dict[str, list[dict[str, str]]]:
    """Tables of a study by title, cells as text."""
    if result.get("kind") == "coverage":
        rows = [
            {
                "parameter": f"`{row['parameter']}`",
                "method": row["method"],
                "tables": str(row["tables"]),
                "coverage of 95 %": f"{row['coverage']:.4f}",
                "99.9 % interval, or p of ranks": f"p = {row['p_value']:.3g}"
                if "p_value" in row
                else f"{row['low']:.4f} to {row['high']:.4f}",
                "verdict": row["verdict"],
            }
            for row in result["rows"]
        ]
        return {"Coverage": rows}
    if result.get("kind") == "reproduce":
        return {
            name: [
                {key: _cell(value) for key, value in shown(row).items() if key != "name"}
                for row in result["rows"]
                if row["name"] == name
            ]
            for name in result["names"]
        }
    if result.get("kind") == "trap":
        return {
            title: [{k: v.replace("-", "\u2212") if k != "what" else v for k, v in row.items()} for row in rows]
            for title, rows in trap_tables(result)
            if rows
        }
    if result.get("kind") == "transfer":
        return {title: rows for title, rows in transfer_tables(result) if rows}
    if result.get("kind") != "design":
        return {}
    proposals = [
        {
            "window": f"{row['window_cycles']:g}",
            "period": f"{row['cycles_per_period']}",
            "offsets (Hz)": f"{row['detuning_1_set_hz']:+g}, {row['detuning_2_set_hz']:+g}",
            "largest input": f"{row['amplitude']:g}",
            "shots": f"{row['shots']}",
            "minutes": f"{row['minutes']:.2f}",
            "variance taken": f"{row['reduction']:.1%}",
            "log of it a minute": f"{row['rate_per_minute']:.3f}",
        }
        for row in result["proposals"][:15]
    ]
    verified = [
        {
            "loop": name,
            "forecast": f"{row['predicted']:.1%}",
            "realized": f"{row['realized']:.1%}",
            "95 % interval": f"{row['low']:.1%} to {row['high']:.1%}",
            "simulations": f"{row['simulations']:.0f}",
        }
        for name, row in result["verified"].items()
    ]
    return {"Loops, the best first": proposals, **({"Forecast and simulation": verified} if verified else {})}


DESIGNED_ON = (
    "Designed on: image, the source known exactly, run on what the dictionary makes of it; home, the source as "
    "calibrated, run on itself; and run on the target: moved, the source as calibrated, taken through the dictionary; "
    "data sheet, the middle of the target's ranges; recalibrated, the target as calibrated from counts; native, the "
    "target known exactly."
)
"""What the names in losses of control mean."""


def captions(result: Mapping[str, Any]) -> dict[str, str]:
    """Sentences below the titles of `listing`, of those tables that need one."""
    if result.get("kind") != "transfer":
        return {}
    return {title: DESIGNED_ON for title, rows in transfer_tables(result) if rows and "designed on" in rows[0]}


def transfer_tables(result: Mapping[str, Any]) -> Iterator[tuple[str, Rows]]:
    """The dictionary, what it leaves out, and the losses of control, as `iontwin transfer` tells them; text."""
    some = lambda value: "\u2013" if value is None else f"{value:.4g}"
    judged = any(row.get("verdict") for row in result.get("dictionary", ()))
    yield (
        "Dictionary",
        [
            {
                "parameter": f"`{row['name']}`",
                "value": f"{row['value']:.6g}" if row["value"] is not None else "infinite",
                "std. error": some(row["std"]),
                **({"verdict": row.get("verdict") or "\u2013"} if judged else {}),
                "unit": row["unit"],
                "relation": row["relation"],
            }
            for row in result.get("dictionary", ())
        ],
    )
    left = result.get("remainder", {})
    yield (
        "What is not carried over: populations, device minus image",
        [
            {
                "cause": name,
                "largest in x": some(gap["x"]),
                "largest in y": some(gap["y"]),
                "rms of y": some(gap["rms_y"]),
                "rms of y without it": some((left["without"].get(name) or {}).get("rms_y")),
            }
            for name, gap in left.get("populations", {}).items()
        ],
    )
    yield (
        "What is not carried over: states",
        [{"what": name, "largest": some(value)} for name, value in left.get("states", {}).items()],
    )
    for what, losses in result.get("control", {}).items():
        yield (
            f"Loss of the {what.replace('_', ' ')}: {result['losses'][what]}",
            [
                {
                    "designed on": name,
                    "mean over seeds": some(one["mean"]),
                    "95 % interval of the mean": f"{one['ci95'][0]:.4g} to {one['ci95'][1]:.4g}",
                    "95 % of the seeds": f"{one['seeds95'][0]:.4g} to {one['seeds95'][1]:.4g}",
                }
                for name, one in losses.items()
            ],
        )


def trap_tables(result: Mapping[str, Any]) -> Iterator[tuple[str, Rows]]:
    """Trap, chain, modes and what the memristor feels, as `iontwin trap` tells them; cells are text."""
    for title, rows in _trap_rows(result):
        yield title, [{key: _cell(value) for key, value in row.items()} for row in rows]


def _trap_rows(result: Mapping[str, Any]) -> Iterator[tuple[str, Rows]]:
    trap, chain, motion = result["trap"], result["chain"], result["motion"]
    rows: Rows = []
    for k, axis in enumerate("xyz"):
        row = {"axis": axis, "secular (MHz)": trap["secular_hz"][k] / 1e6}
        if trap["q"] is not None:
            row |= {
                "a": trap["a"][k],
                "q": trap["q"][k],
                "beta": trap["beta"][k],
                "pseudopotential (MHz)": trap["pseudopotential_hz"][k] / 1e6,
            }
        rows.append(row)
    yield "Trap", rows
    yield "Geometry and stray field", [{"what": k, "value": v} for k, v in trap["more"].items()]
    yield "Chain", [{"what": k, "value": v} for k, v in chain["more"].items()]
    shown = motion["modes"]
    yield f"Modes ({len(shown)} of {motion['count']}, those that are felt the most)", shown
    yield "What the memristor feels", [{"what": k, "value": v} for k, v in motion["more"].items()]


def _cell(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
