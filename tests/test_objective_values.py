"""The objective's functions, in torch and in JAX, against one stored table of values, `objective_values.json`.

    python tests/test_objective_values.py

writes the table anew, from the papers' closed forms in terms of the angle φ with ᾱ = cos² φ, in double precision.
"""

import json
import math
from pathlib import Path

import pytest

TABLE = Path(__file__).with_name("objective_values.json")
CLEAN, NOISE, PREDICTION = [0.5, -1.25, 2.0], [-0.75, 0.125, 1.5], [0.25, -0.5, 1.0]
ANGLES = {"zero terminal SNR": math.pi / 2, "much noise": 1.4, "half": math.pi / 4, "little noise": 0.1}


def closed_forms(angle):
    """{function: [(arguments before ᾱ, arguments after it, value)]}; None stands for the noisy x_t."""
    cosine, sine = (0.0 if angle == math.pi / 2 else math.cos(angle)), math.sin(angle)
    noisy = [cosine * x + sine * e for x, e in zip(CLEAN, NOISE, strict=True)]
    velocity = [cosine * e - sine * x for x, e in zip(CLEAN, NOISE, strict=True)]
    values = {"add_noise": [([CLEAN, NOISE], [], noisy)]}
    targets = {"epsilon": NOISE, "v_prediction": velocity, "sample": CLEAN}
    values["prediction_target"] = [([kind, CLEAN, NOISE], [], target) for kind, target in targets.items()]
    # Of x_t and a prediction, ε: on the circle through x_0 at 0 and ε at 90 degrees, v stands at 90 degrees to x_t.
    solved = {
        "epsilon": PREDICTION,
        "v_prediction": [sine * x + cosine * p for x, p in zip(noisy, PREDICTION, strict=True)],
    }
    solved["sample"] = [(x - cosine * p) / sine for x, p in zip(noisy, PREDICTION, strict=True)]
    values["predicted_noise"] = [([kind, PREDICTION, noisy], [], value) for kind, value in solved.items()]
    moved = [e + sine**2.0 * (e - p) for e, p in zip(NOISE, PREDICTION, strict=True)]
    moved_noisy = [cosine * x + sine * e for x, e in zip(CLEAN, moved, strict=True)]
    values["dream"] = [([noisy, NOISE, PREDICTION], [2.0], [moved_noisy, moved])]
    snr = (cosine / sine) ** 2
    smaller = min(snr, 5.0)
    weights = {"epsilon": smaller / snr if snr else 1.0, "v_prediction": smaller / (snr + 1), "sample": smaller}
    values["min_snr_weight"] = [([kind], [5.0], weight) for kind, weight in weights.items()]
    error = [
        sum((x - e) ** 2 for x, e in zip(*pair, strict=True)) / 3 for pair in ((CLEAN, NOISE), (NOISE, PREDICTION))
    ]
    batches = [[CLEAN, NOISE], [NOISE, PREDICTION], [cosine, sine]]
    values["weighted_squared_error"] = [(batches, None, [cosine * error[0], sine * error[1]])]
    return values


def table():
    """[{"function", "case", "arguments", "value"}]"""
    rows = []
    for case, angle in ANGLES.items():
        alpha = 0.0 if angle == math.pi / 2 else math.cos(angle) ** 2
        for function, entries in closed_forms(angle).items():
            for before, after, value in entries:
                arguments = before if after is None else [*before, alpha, *after]
                rows.append({"function": function, "case": case, "arguments": arguments, "value": value})
    return rows


def in_torch():
    import torch

    import train_text_to_image

    return train_text_to_image, lambda values: torch.tensor(values, dtype=torch.float32)


def in_jax():
    import jax.numpy as jnp

    import train_text_to_image_flax

    return train_text_to_image_flax, lambda values: jnp.asarray(values, jnp.float32)


SCALARS = {"min_snr_weight": 2, "dream": 4}  # place of an argument that is a plain number


@pytest.mark.parametrize("framework", [in_torch, in_jax])
def test_the_stored_values(framework):
    script, to_tensor = framework()
    rows = json.loads(TABLE.read_text())
    assert len(rows) == len(ANGLES) * 12
    for row in rows:
        scalar = SCALARS.get(row["function"])
        arguments = [
            value if isinstance(value, str) or place == scalar else to_tensor(value)
            for place, value in enumerate(row["arguments"])
        ]
        result = getattr(script, row["function"])(*arguments)
        results = [part.tolist() for part in result] if isinstance(result, tuple) else result.tolist()
        # float32, and at little noise 1 - ᾱ has lost two digits
        assert flat(results) == pytest.approx(flat(row["value"]), rel=2e-5, abs=2e-6), row


def flat(values):
    return [number for value in values for number in flat(value)] if isinstance(values, list) else [values]


def test_the_table_is_what_the_closed_forms_say():
    stored = json.loads(TABLE.read_text())
    for row, expected in zip(stored, table(), strict=True):
        assert {**row, "value": None, "arguments": None} == {**expected, "value": None, "arguments": None}
        assert flat(row["value"]) == pytest.approx(flat(expected["value"]), rel=1e-12, abs=1e-15)


if __name__ == "__main__":
    TABLE.write_text("[\n" + ",\n".join(f"  {json.dumps(row)}" for row in table()) + "\n]\n")
