"""What a report says, made from its runs.jsonl alone: the table, the plot of speeds and the plot of losses.

python tests/benchmarks/report.py tests/benchmarks/results/small-cpu        # writes them again
"""

import argparse
import json
import math
import statistics
from pathlib import Path

POINT = ("batch_size", "rows", "processes")  # what can be swept
POINT_WORDS = {
    "batch_size": "images per step and process",
    "rows": "images in the data set",
    "processes": "processes",
}
PEAKS = {
    "peak_resident_bytes": "peak resident, GiB",
    "peak_private_bytes": "peak private, GiB",
    "peak_gpu_bytes": "peak GPU, GiB",
}
GIB = 2**30
COLOURS = ("#3b6fb6", "#d1652b", "#4d9a57", "#8c5fb0", "#b8a02e", "#5aa9b8", "#b2507f", "#707070", "#8a6a4f", "#20304a")
GREY = "#666666"


class NothingMeasured(Exception):
    """There is no run to report on, or a folder without events."""


# ----------------------------------------------------------------------------------------------------------------------
# From events to figures
# ----------------------------------------------------------------------------------------------------------------------


def read_updates(folder, tag="train_loss"):
    """Read TensorBoard's events anywhere below `folder` (Path): [(step, wall clock in seconds, loss)], by step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    updates = {}
    for path in sorted(folder.rglob("events.out.tfevents.*")):
        events = EventAccumulator(str(path), size_guidance={"scalars": 0})  # 0: all of them
        events.Reload()
        if tag in events.Tags()["scalars"]:
            updates |= {event.step: (event.step, event.wall_time, event.value) for event in events.Scalars(tag)}
    return [updates[step] for step in sorted(updates)]


def marks(updates, warmup, window=1):
    """The moments between which is measured, [(step, wall clock)]: from the end of update `warmup` on, one per window.

    An event's clock is that of the moment when the update was handed to the device, which may run far behind; only once
    every `window` updates (--logging_steps) the CPU waits for it. The update after such a wait, 1 in windows of its
    own, is handed over at the true time, so that what lies between two of these is whole.
    """
    return [(step, clock) for step, clock, _ in updates if step >= warmup and (step - 1) % window == 0]


def speed(marks, batch_size):
    """Figures of the stretch from the first to the last mark. batch_size: images per update, of all processes."""
    (first, started), (last, ended) = marks[0], marks[-1]
    parts = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in zip(marks, marks[1:], strict=False)]
    return {
        "images_per_second": batch_size * (last - first) / (ended - started),
        "step_seconds": statistics.median(parts),
        "measured_steps": last - first,
        "measured_seconds": ended - started,
    }


def pair_ratios(runs, base):
    """How many times as fast as those of `base` the runs are, round by round: list of float.

    Both: {round: images per second}. Only rounds in which both ran count.
    """
    return [runs[number] / base[number] for number in sorted(runs.keys() & base.keys())]


def loss_difference(losses, plain):
    """The largest difference of two courses of the loss, [[step, loss]], at a step that both have; None without one."""
    plain = dict(plain)
    differences = [abs(loss - plain[step]) for step, loss in losses if step in plain]
    return max(differences, default=None)


def summarise(lines):
    """A row of the table for each point and variant, as dicts, in the order in which they were first run."""
    measured = [line for line in lines if line["purpose"] == "measure" and "failed" not in line]
    groups = {}
    for line in measured:
        key = (*(line[name] for name in POINT), line["variant"])
        groups.setdefault(key, {})[line["round"]] = line
    fills = {
        (*(line[name] for name in POINT), line["variant"]): line["first_step_seconds"]
        for line in lines
        if line["purpose"] == "fill" and "failed" not in line
    }
    order = {line["variant"]: k for k, line in reversed(list(enumerate(measured)))}
    keys = sorted(groups, key=lambda key: (key[:3], order[key[3]]))
    return [summary(key, groups, fills.get(key)) for key in keys]


def summary(key, groups, filled):
    """One row: medians over the rounds of `groups[key]`, and ratios to every base at the same point."""
    rounds, point = groups[key], key[:3]

    def median(name):
        values = [line[name] for line in rounds.values() if line.get(name) is not None]
        return statistics.median(values) if values else None

    speeds = {other: {n: run["images_per_second"] for n, run in runs.items()} for other, runs in groups.items()}
    bases = [other for other, runs in groups.items() if other[:3] == point and is_base(runs)]
    ratios = {base[3]: pair_ratios(speeds[key], speeds[base]) for base in bases if base != key}
    plain, first = groups.get((*point, "plain")), next(iter(rounds.values()))
    difference = None
    if plain and first["kind"] == "lever" and first["variant"] != "plain":
        pairs = [loss_difference(run["losses"], plain[n]["losses"]) for n, run in rounds.items() if n in plain]
        difference = max((pair for pair in pairs if pair is not None), default=None)
    names = ("images_per_second", "step_seconds", "first_step_seconds", "share_of_matmul_rate", *PEAKS)
    return {
        **dict(zip(POINT, point, strict=True)),
        "variant": key[3],
        "kind": first["kind"],
        "rounds": len(rounds),
        **{name: median(name) for name in names},
        "all_images_per_second": list(speeds[key].values()),
        "ratios": {base: values for base, values in ratios.items() if values},
        "fill_seconds": filled and filled - median("first_step_seconds"),
        "flops_per_image": first["flops_per_image"],
        "loss_difference": difference,
        "losses": first["losses"],
    }


def is_base(runs):
    """Whether ratios are taken to these runs, {round: line}: the plain one's, the bare one's, and other scripts'."""
    line = next(iter(runs.values()))
    return line["variant"] in ("plain", "bare") or line["kind"] == "versus"


# ----------------------------------------------------------------------------------------------------------------------
# Table
# ----------------------------------------------------------------------------------------------------------------------


def figure(value, digits=3):
    """A number to `digits` significant digits without an exponent, or a dash where there is none."""
    if value is None:
        return "–"
    if value == 0 or abs(value) < 1e-3:
        return f"{value:.1e}" if value else "0"
    return f"{value:,.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def ratio_words(values):
    """The median of ratios, and their range."""
    if not values:
        return "–"
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def columns_of(rows):
    """The columns of the table: [(heading, function of a row to str)]; those that are empty everywhere are left out."""
    bases = list(dict.fromkeys(base for row in rows for base in row["ratios"]))
    swept = [name for name in POINT if len({row[name] for row in rows}) > 1]
    columns = [(POINT_WORDS[name], lambda row, name=name: f"{row[name]:,}") for name in swept]
    columns += [
        ("run", lambda row: row["variant"]),
        ("images/s", lambda row: figure(row["images_per_second"])),
        ("s per step", lambda row: figure(row["step_seconds"])),
    ]
    columns += [(f"times {base}", lambda row, base=base: ratio_words(row["ratios"].get(base))) for base in bases]
    columns += [("s to first step", lambda row: figure(row["first_step_seconds"]))]
    columns += [("s to fill the cache", lambda row: figure(row["fill_seconds"]))]
    columns += [(head, lambda row, name=name: figure(row[name] and row[name] / GIB)) for name, head in PEAKS.items()]
    columns += [
        ("GFLOP per image", lambda row: figure(row["flops_per_image"] / 1e9)),
        ("of matmul rate", lambda row: f"{row['share_of_matmul_rate']:.1%}"),
        ("largest loss difference to plain", lambda row: figure(row["loss_difference"], 2)),
    ]
    return [(head, cell) for head, cell in columns if any(cell(row) != "–" for row in rows)]


def heading(lines, rows):
    """What was measured, on what, in sentences."""
    line = next(line for line in lines if line["purpose"] == "measure" and "failed" not in line)
    costs, fixed = line["costs"], [name for name in POINT if len({row[name] for row in rows}) == 1]
    versions = ", ".join(f"{name} {version}" for name, version in line["versions"].items())
    point = ", ".join(f"{POINT_WORDS[name]}: {rows[0][name]:,}" for name in fixed)
    flops = ", ".join(f"{name} {figure(count / 1e9)}" for name, count in costs["flops"].items())
    dtype = "bfloat16" if costs["device_type"] == "cuda" else "float32"
    rate, rounds = figure(costs["matmul_flops_per_second"] / 1e9), max(row["rounds"] for row in rows)
    how = f"`{line['script']}`, size `{line['size']}` at {line['resolution']} px"
    how += f", mixed precision {line['mixed_precision']}" + ", with EMA" * line["use_ema"]
    how += f", `{line['more_flags']}`" * bool(line["more_flags"])
    return [
        f"{how}; {point}.",
        f"Device: {costs['device']}; {dtype} matrix products at {rate} GFLOP/s.",
        f"GFLOP per image: {flops} ({costs['trained']}: forward and backward; the others: forward).",
        f"Medians over {rounds} rounds; ratios pair by pair within a round, with their range."
        if rounds > 1
        else "One round.",
        f"{line['date'][:10]}, commit {line['commit']}, {versions}.",
    ]


def table(lines, rows):
    """The report's table.md, as text."""
    columns = columns_of(rows)
    text = heading(lines, rows) + [""]
    text.append("| " + " | ".join(head for head, _ in columns) + " |")
    text.append("|" + "---|" * len(columns))
    text += ["| " + " | ".join(cell(row) for _, cell in columns) + " |" for row in rows]
    left_out = [
        line.get("skipped") or f"failed: {line['failed']}" for line in lines if {"skipped", "failed"} & set(line)
    ]
    if left_out:
        text += ["", *(f"- {sentence}" for sentence in left_out)]
    return "\n\n".join(text[:5]) + "\n" + "\n".join(text[5:]) + "\n"


# ----------------------------------------------------------------------------------------------------------------------
# Plots
# ----------------------------------------------------------------------------------------------------------------------


def figure_of(*shape, **options):
    """A matplotlib figure and its axes, drawn without a screen, with quiet axes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sheet, axes = plt.subplots(*shape, layout="constrained", dpi=130, squeeze=False, **options)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(colors=GREY)
    return sheet, axes


PANELS = (
    ("images per second", lambda row: row["images_per_second"]),
    ("seconds to the first step", lambda row: row["first_step_seconds"]),
    ("peak memory, GiB", lambda row: (row["peak_gpu_bytes"] or row["peak_resident_bytes"]) / GIB),
)


def draw_speed(rows, title, path):
    """speed.png: a bar for each run, or, of a sweep, a line over what was swept."""
    swept = [name for name in POINT if len({row[name] for row in rows}) > 1]
    names = list(dict.fromkeys(row["variant"] for row in rows))
    height = 3.6 if swept else 1.3 + 0.42 * len(names)
    sheet, axes = figure_of(1, 3, figsize=(12, height), sharey=not swept)
    for number, (axis, (words, value)) in enumerate(zip(axes[0], PANELS, strict=True)):
        axis.set_xlabel(words)
        if swept:
            axis.set(xlabel=POINT_WORDS[swept[0]], ylabel=words)
            draw_lines(axis, rows, swept[0], names, value)
            axis.set_ylim(0, 1.1 * max(value(row) for row in rows))
        else:
            draw_bars(axis, rows, value, dots=number == 0)
    private = [row for row in rows if row["peak_private_bytes"] and not row["peak_gpu_bytes"]]
    if swept and private:
        axes[0][2].set_ylabel("peak memory, GiB; dashed: private")
        draw_lines(axes[0][2], private, swept[0], names, lambda row: row["peak_private_bytes"] / GIB, "o--")
    if swept and len(names) > 1:
        axes[0][0].legend(frameon=False, fontsize=9)
    sheet.suptitle(title, fontsize=10)
    sheet.savefig(path)


def draw_bars(axis, rows, value, dots):
    """A horizontal bar for each row, with its number; dots: the single rounds."""
    for place, row in enumerate(rows):
        colour = COLOURS[place % len(COLOURS)]
        axis.barh(place, value(row), color=colour, height=0.62)
        speeds = row["all_images_per_second"] if dots else []
        axis.plot(speeds, [place] * len(speeds), "o", color="black", markersize=3, alpha=0.6)
        end = (max([value(row), *speeds]), place)
        axis.annotate(figure(value(row)), end, (6, 0), textcoords="offset points", va="center")
    axis.set_yticks(range(len(rows)), [row["variant"] for row in rows])
    axis.set_ylim(len(rows) - 0.45, -0.55)
    axis.set_xlim(right=1.15 * axis.get_xlim()[1])


def draw_lines(axis, rows, swept, names, value, style="o-"):
    """A line for each run over what was swept, on a logarithmic axis with a mark at every value."""
    for number, name in enumerate(names):
        own = [row for row in rows if row["variant"] == name]
        axis.plot(
            [row[swept] for row in own],
            [value(row) for row in own],
            style,
            color=COLOURS[number % len(COLOURS)],
            label=name,
        )
    values = sorted({row[swept] for row in rows})
    axis.set_xscale("log")
    axis.minorticks_off()
    axis.set_xticks(values, [f"{value:,}" for value in values])


def draw_losses(rows, title, path):
    """loss.png: the course of every lever's loss over the plain run's, and what they differ by. First point only."""
    point = [rows[0][name] for name in POINT]
    own = [row for row in rows if row["kind"] == "lever" and [row[name] for name in POINT] == point]
    sheet, axes = figure_of(2, 1, figsize=(9, 6), sharex=True)
    curve, differences = axes[:, 0]
    plain = dict(next((row["losses"] for row in own if row["variant"] == "plain"), []))
    for number, row in enumerate(own):
        steps, losses = zip(*row["losses"], strict=True)
        colour, is_plain = COLOURS[number % len(COLOURS)], row["variant"] == "plain"
        style = {"color": "black", "linewidth": 3, "alpha": 0.25} if is_plain else {"color": colour, "linewidth": 1}
        curve.plot(steps, losses, label=row["variant"], **style)
        shared = [(step, abs(loss - plain[step])) for step, loss in row["losses"] if step in plain]
        if shared and not is_plain:
            differences.plot(*zip(*shared, strict=True), color=colour, linewidth=1, marker=".", label=row["variant"])
    curve.set_ylabel("train_loss")
    curve.legend(frameon=False, fontsize=9, ncols=4)
    differences.set(xlabel="update", ylabel="absolute difference to plain")
    differences.set_yscale("symlog", linthresh=1e-7)
    differences.set_ylim(bottom=0)
    if not any(any(line.get_ydata()) for line in differences.lines):
        differences.set_yticks([0])
        words = "none, at any update" if differences.lines else "no lever beside plain"
        differences.text(0.5, 0.5, words, transform=differences.transAxes, ha="center", color=GREY)
    sheet.suptitle(title, fontsize=10)
    sheet.savefig(path)


def write(folder):
    """Write table.md, speed.png and loss.png beside `folder`/runs.jsonl. Raises NothingMeasured."""
    lines = [json.loads(line) for line in (folder / "runs.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = summarise(lines)
    if not rows:
        failed = [line["failed"] for line in lines if "failed" in line]
        raise NothingMeasured(failed[0] if failed else f"{folder}: there are no runs in it")
    (folder / "table.md").write_text(table(lines, rows), encoding="utf-8")
    line = lines[-1]
    title = f"{line['script']}, size {line['size']}, {line['resolution']} px, {line['costs']['device']}"
    draw_speed(rows, title, folder / "speed.png")
    draw_losses(rows, title, folder / "loss.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of a report")
    write(parser.parse_args().folder)
