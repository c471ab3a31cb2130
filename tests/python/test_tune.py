# SPDX-License-Identifier: Apache-2.0
"""The tuner: the numbers of `sparge tune` on the same inputs, and how it ends early."""
import json
import math
import os
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import sparge
from safetensors.numpy import load_file, save_file

CAPTURE = Path(__file__).resolve().parents[2] / "experiments/capture/smollm2-135m"
BOUNDS = {"l1": 0.08, "l2": 0.09}
CAUSAL = {"is_causal": "end", "sink": True}


@pytest.fixture(scope="module")
def inputs():
    """Two parts of a text: three heads of one key head, 768 tokens."""
    found = load_file(CAPTURE / "layer06_group2.safetensors")
    return [tuple(np.ascontiguousarray(found[name][:, :, at:at + 768], np.float32)
                  for name in "qkv") for at in (0, 1024)]


WAYS = [
    ({**BOUNDS}, ["--l1", "0.08", "--l2", "0.09"], 0),
    ({**BOUNDS, "bound": "mean"}, ["--l1", "0.08", "--l2", "0.09", "--bound", "mean"], 1),
    ({**BOUNDS, "by": "topk", "qk_dtype": "f32"},
     ["--l1", "0.08", "--l2", "0.09", "--by", "topk", "--qk-dtype", "f32"], 0),
    ({"sparsity": 0.3, "block": (64, 64)}, ["--sparsity", "0.3", "--block-q", "64"], 1),
]


@pytest.mark.parametrize("arguments, options, held_out", WAYS)
def test_the_numbers_of_the_program(program, inputs, tmp_path, arguments, options, held_out):
    """Every figure of every head but seconds, and what the file says of itself but its inputs."""
    files = [tmp_path / str(n) / "layer06.safetensors" for n in range(len(inputs))]
    for file, some in zip(files, inputs):
        file.parent.mkdir()
        save_file(dict(zip("qkv", some)), file)
    captures = [*files[:len(files) - held_out], *["--held-out"] * held_out, *files[-1:] * held_out]
    subprocess.run([program, "tune", *captures, "--causal", "--sink", *options, "-o",
                    tmp_path / "want.json"], check=True, capture_output=True)
    found = sparge.tune(inputs, held_out=held_out, **CAUSAL, **arguments)
    found.save(tmp_path / "got.json", layer=6)
    got, want = (json.loads((tmp_path / name).read_text()) for name in ("got.json", "want.json"))
    for document in (got, want):
        document["inputs"] = None
        for head in document["heads"]:
            head["seconds"] = None
    assert got == want
    assert list(got) == list(want) and list(got["heads"][0]) == list(want["heads"][0])


def test_thresholds_keep_the_bound(inputs):
    """They are what a call takes, and cost there what the tuner says."""
    found = sparge.tune(inputs, **BOUNDS, **CAUSAL)
    errors = [[], [], []]
    for some in inputs:
        got = sparge.attention(*some, params=found.thresholds)
        want = sparge.attention(*some, is_causal=True, theta=-1, tau=1, qk_dtype="f32",
                                pv_dtype="f32")
        for head in range(3):
            errors[head].append(np.abs(got - want)[0, head].sum(dtype=np.float64)
                                / np.abs(want)[0, head].sum(dtype=np.float64))
    for head, seen in zip(found.heads, errors):
        # The sums are of floats in another order: a relative 1e-5 is 100 times what that makes.
        assert head.in_sample.inputs == 2 and head.finite
        assert math.isclose(max(seen), head.in_sample.worst, rel_tol=1e-5)
        assert head.in_sample.worst <= BOUNDS["l2"]
    assert sum(head.in_sample.sparsity > 0.1 for head in found.heads) > 1


def test_what_is_told_meanwhile(inputs):
    shares, heads = [], {}
    found = sparge.tune(inputs[:1], **BOUNDS, **CAUSAL, progress=shares.append,
                        finished=heads.__setitem__)
    assert shares == sorted(shares) and 0 <= shares[0] and shares[-1] == 1
    assert [str(heads[n]) for n in range(3)] == list(map(str, found.heads))  # NaN is not NaN


def test_an_end_by_time(inputs):
    found = sparge.tune(inputs, **BOUNDS, **CAUSAL, seconds=1e-9)
    assert found.heads == (None, None, None) and found.params().layers == ()
    with pytest.raises(ValueError, match="heads 0, 1, 2 have no thresholds"):
        found.thresholds  # noqa: B018


def test_an_end_by_what_a_callback_raises(inputs):
    def late(share):
        if share > 0.3:
            raise LookupError("enough")

    with pytest.raises(LookupError, match="enough"):
        sparge.tune(inputs, **BOUNDS, **CAUSAL, progress=late)
    with pytest.raises(ZeroDivisionError):
        sparge.tune(inputs, **BOUNDS, **CAUSAL, finished=lambda head, found: 1 / 0)


def test_ctrl_c_keeps_what_was_finished(inputs):
    """One thread: the second head has not begun when the first is told of."""
    kept = {}

    def finished(head, found):
        kept[head] = found
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        sparge.tune(inputs, **BOUNDS, **CAUSAL, threads=1, finished=finished)
    whole = sparge.tune(inputs, **BOUNDS, **CAUSAL)
    assert list(kept) == [0]
    assert [kept[0].theta, kept[0].in_sample] == [whole.heads[0].theta, whole.heads[0].in_sample]


def test_nan_leaves_a_head_dense(inputs):
    q, k, v = (x.copy() for x in inputs[0])
    q[0, 1, 5, 0] = np.nan
    found = sparge.tune([(q, k, v)], **BOUNDS, **CAUSAL)
    assert [head.finite for head in found.heads] == [True, False, True]
    head = found.heads[1]
    assert (head.dense, head.theta, head.tau, head.lambda_) == (True, -1, 1, -np.inf)
    assert head.nonfinite > 0 and head.in_sample.inputs == 0 and math.isnan(head.in_sample.worst)


@pytest.mark.parametrize("arguments, said", [
    ({}, "l1"), ({"l1": 0.2, "l2": 0.1}, "l1"), ({**BOUNDS, "sparsity": 0.5}, "leave out l1, l2"),
    ({"sparsity": 1.5}, "sparsity"), ({**BOUNDS, "held_out": 2}, "held_out"),
    ({**BOUNDS, "by": "lambda"}, "by is 'lambda'"), ({**BOUNDS, "bound": "all"}, "bound is 'all'"),
    ({**BOUNDS, "theta": 0.5}, "theta is what is tuned"),
    ({**BOUNDS, "topk": 0.5}, "topk is what is tuned"),
    ({**BOUNDS, "min_mass": 0.5}, "min_mass is what is tuned"),
    ({**BOUNDS, "k_bias": np.zeros((1, 1, 768), np.float32)}, "k_bias is of one input"),
    ({**BOUNDS, "held_out": 0.5}, "held_out is 0.5, it must be a whole number"),
    ({**BOUNDS, "seconds": "1"}, "seconds is '1', it must be a number"),
    ({"l1": "0.1", "l2": 0.2}, "l1 is '0.1', it must be a number"),
    ({**BOUNDS, "mean": True}, "no argument 'mean'"),
])
def test_what_is_refused(inputs, arguments, said):
    with pytest.raises((ValueError, TypeError), match=said):
        sparge.tune(inputs, **arguments)


def test_inputs_that_do_not_fit(inputs):
    (q, k, v), other = inputs
    with pytest.raises(ValueError, match="inputs is empty"):
        sparge.tune([], **BOUNDS)
    with pytest.raises(TypeError, match=r"inputs\[0\] is a tuple, it must be \(q, k, v\)"):
        sparge.tune([(q, k)], **BOUNDS)
    with pytest.raises(ValueError, match=r"inputs\[1\] has heads 2, it must be 3"):
        sparge.tune([(q, k, v), (other[0][:, :2], *other[1:])], **BOUNDS)
    with pytest.raises(ValueError, match="is_causal is True with 100 queries and 768 keys"):
        sparge.tune([(q, k, v), (q[:, :, :100], k, v)], **BOUNDS, is_causal=True)
    with pytest.raises(ValueError, match="heads has 2 numbers, it must have 3"):
        sparge.tune(inputs, **BOUNDS, seconds=1e-9).params(heads=[1, 2])
