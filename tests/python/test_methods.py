# SPDX-License-Identifier: Apache-2.0
"""Methods by name, and their plans, beside the textbook and the program."""
import json
import subprocess
import threading
from pathlib import Path

import brute
import numpy as np
import pytest
import sparge
from safetensors.numpy import load_file, save_file

CAPTURE = (Path(__file__).resolve().parents[2] /
           "experiments/capture/smollm2-135m/layer12_group1.safetensors")
METHODS = {m.name: m for m in sparge.methods()}
DENSE = {"qk_dtype": "f32", "pv_dtype": "f32"}


@pytest.fixture(scope="module")
def qkv():
    """Of 512 tokens of the committed capture: [1, 3, 512, 64] and [1, 1, 512, 64]."""
    return [np.ascontiguousarray(x[:, :, 2048:2560]) for x in map(load_file(CAPTURE).get, "qkv")]


def causal_of(name):
    return "not_causal" not in METHODS[name].needs


def context_of(name, tokens):
    """What a method needs beside q, k and v."""
    given = {"grid": {"grid": (1, tokens // 16, 16, 0, tokens % 16)},
             "segments": {"segment_ends": sorted({tokens // 2, tokens})},
             "state": {"state": sparge.State()}}
    return {key: x for need in METHODS[name].needs for key, x in given.get(need, {}).items()}


def test_they_are_those_of_the_program(program):
    told = json.loads(subprocess.check_output([program, "methods", "--json"]))
    for m in told:
        mine = METHODS[m["name"]]
        for key in ("title", "paper", "repository", "commit", "evidence"):
            assert getattr(mine, key) == m[key]
        assert mine.kind == m["class"] and list(mine.needs) == m["needs"]
        assert [p.name for p in mine.params] == [p["name"] for p in m["params"]]
        for p, q in zip(mine.params, m["params"]):
            for value, key in ((p.low, "low"), (p.high, "high"), (p.default, "default")):
                assert np.isinf(value) if q[key] is None else value == pytest.approx(q[key], 1e-6)
    assert list(METHODS) == [m["name"] for m in told]


@pytest.mark.parametrize("name", METHODS)
def test_a_plan_attends_to_its_pairs(name, qkv):
    q, k, v = (x.astype(np.float32) for x in qkv)
    plan = sparge.plan(q, k, v, method=name, is_causal=causal_of(name), backend=(
        "ref" if name in ("spargeattn_paper", "spargeattn_upstream") else "auto"),
        block=(32, 32), **context_of(name, 512), **DENSE)
    pairs = plan.pairs()
    assert pairs.shape == (1, 3, 512, 512) and plan.density == plan.counts.density
    o, lse, stats = plan.run(return_lse=True, return_stats=True)
    seen = brute.visible(causal_of(name), 512, 512)
    if not any(part.pooled for part in plan.parts):
        want, want_lse = brute.attention(q, k, v, pairs != 0)
        # keys in another order are summed in another order: twice the bound
        assert np.abs(o - want).max() <= 2 * brute.bound(q, k, v)
        assert np.array_equal(np.isinf(lse), np.isinf(want_lse))
        assert plan.counts.qk_tokens == np.count_nonzero(pairs)
    assert plan.counts.tokens == 3 * np.count_nonzero(seen) == stats.counts.tokens
    assert plan.seconds >= 0 and plan.multiply_adds >= 0
    if plan.plain:
        mask = plan.mask
        assert mask.density == plan.density
        again, its = plan.run(return_mask=True)
        assert np.array_equal(again, o) and np.array_equal(its.blocks, mask.blocks)
        assert np.array_equal(mask.to_tokens() & seen, pairs == 1)
    else:
        with pytest.raises(ValueError, match=f"the plan of {name} has several parts, or tokens in"):
            plan.run(return_mask=True)


@pytest.mark.parametrize("name", [name for name, m in METHODS.items() if m.params])
def test_density_finds_what_the_program_finds(name, qkv, program, tmp_path):
    save_file(dict(zip("qkv", qkv)), tmp_path / "x.safetensors")
    if "grid" in METHODS[name].needs:
        (tmp_path / "manifest.json").write_text(
            json.dumps({"grid": [1, 32, 16], "files": [{"file": "x.safetensors"}]}))
    rules = name.partition("_")[2] if name.startswith("spargeattn_") else None
    backend = "ref" if rules else "cpu"
    options = ["--causal"] * causal_of(name) + [f"--backend={backend}"]
    run = subprocess.run([program, "run", tmp_path / "x.safetensors", "--method", name, "--density",
                          "0.5", "-o", tmp_path / "o.npy", "--pairs-out", tmp_path / "pairs.npy",
                          "--block-q=32", "--block-k=32", *options], capture_output=True, text=True)
    asked = dict(method=name, density=0.5, is_causal=causal_of(name), block=(32, 32),
                 backend=backend, **context_of(name, 512))
    if run.returncode:
        assert "cannot be reached" in run.stderr
        with pytest.raises(ValueError) as error:
            sparge.plan(*qkv, **asked)
        assert str(error.value) in run.stderr
        return
    told = json.loads(run.stdout)
    plan = sparge.plan(*qkv, **asked)
    o, stats = plan.run(return_stats=True)
    first = METHODS[name].params[0].name
    assert plan.params[first] == pytest.approx(told["params"][first], 1e-6)
    assert o.tobytes() == np.load(tmp_path / "o.npy").tobytes()
    assert np.array_equal(plan.pairs(), np.load(tmp_path / "pairs.npy"))
    assert stats.counts.qk_done == told["kept_blocks"]
    assert stats.density == pytest.approx(told["density_tokens"], 1e-8)  # JSON has nine digits
    assert np.array_equal(sparge.attention(*qkv, **asked), o)


def test_density_alone_is_spargeattn(qkv, program, tmp_path):
    save_file(dict(zip("qkv", qkv)), tmp_path / "x.safetensors")
    subprocess.run([program, "run", tmp_path / "x.safetensors", "--density", "0.4", "--theta=-1",
                    "--block-q=16", "--block-k=16", "--mask-out", tmp_path / "mask.npy",
                    "--mask-only"], check=True, stdout=subprocess.DEVNULL)
    options = dict(density=0.4, theta=-1, block=(16, 16))
    mask = sparge.predict(*qkv[:2], **options)
    assert np.array_equal(mask.blocks, np.load(tmp_path / "mask.npy"))
    assert mask.density == pytest.approx(0.4, abs=0.01)
    plan = sparge.plan(*qkv, **options)
    assert plan.method.name == "spargeattn" and plan.params["theta"] == -1
    same = sparge.predict(*qkv[:2], tau=plan.params["tau"], theta=-1, block=(16, 16))
    assert np.array_equal(mask.blocks, same.blocks)


def test_a_plan_without_a_method_is_attention(qkv):
    options = dict(tau=[0.3, 0.6, 0.9], theta=-1, block=(32, 32))
    plan = sparge.plan(*qkv, **options)
    assert plan.params == {} and plan.parts[0].predicted
    want, mask = sparge.attention(*qkv, return_mask=True, **options)
    assert np.array_equal(plan.run(), want)  # predicts by itself
    assert np.array_equal(plan.mask.blocks, mask.blocks)
    assert np.array_equal(plan.run(), want)  # over the mask
    assert sparge.plan(*qkv, tau=0.3).params["tau"] == pytest.approx(0.3)


def test_three_spellings(qkv):
    spellings = [dict(method="xattention:tau=0.6,stride=4"),
                 dict(method="xattention", method_params={"tau": 0.6, "stride": 4}),
                 dict(method=METHODS["xattention"], method_params={"stride": 4, "tau": 0.6})]
    plans = [sparge.plan(*qkv, is_causal=True, **x) for x in spellings]
    for plan in plans:
        assert plan.params == {"tau": 0.6, "stride": 4, "block": 128}
        assert np.array_equal(plan.pairs(), plans[0].pairs())
    assert sparge.plan(*qkv, method="xattention").params["tau"] == 0.9


def test_a_state_is_kept_from_call_to_call(qkv):
    """minference chooses a pattern for each head once; the second call has nothing to choose."""
    options = dict(method="minference:pattern=0", is_causal=True)
    state = sparge.State()
    first = sparge.plan(*qkv, state=state, **options)
    second = sparge.plan(*qkv, state=state, **options)
    fresh = sparge.plan(*qkv, **options)
    assert np.array_equal(second.pairs(), fresh.pairs())
    assert second.multiply_adds < first.multiply_adds == fresh.multiply_adds
    with pytest.raises(ValueError, match="state is that of 'minference' and method is 'window'"):
        sparge.plan(*qkv, method="window", state=state)


def test_a_plan_keeps_its_arrays():
    plan = sparge.plan(*(np.ones((2, 64, 16), np.float32) for _ in range(3)), method="window")
    other = [np.zeros((2, 64, 16), np.float32) for _ in range(20)]
    assert np.all(plan.run() == 1) and len(other) == 20


def test_a_plan_runs_in_many_threads(qkv):
    plan = sparge.plan(*qkv, tau=0.5, block=(32, 32))
    found = []
    threads = [threading.Thread(target=lambda: found.append((plan.run(), plan.density)))
               for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and all(np.array_equal(o, found[0][0]) for o, _ in found)
    assert len({density for _, density in found}) == 1


@pytest.mark.parametrize("batch, q_len, k_len", [(0, 5, 5), (1, 0, 5), (1, 5, 0), (1, 1, 1)])
def test_plans_of_next_to_nothing(batch, q_len, k_len):
    q, k = np.ones((batch, 2, q_len, 8), np.float32), np.ones((batch, 1, k_len, 8), np.float32)
    for name in METHODS:
        if "grid" in METHODS[name].needs and q_len != k_len:
            continue
        options = dict(method=name, **context_of(name, k_len),
                       is_causal="end" if causal_of(name) else False,
                       backend="ref" if name.startswith("spargeattn_") else "auto")
        plan = sparge.plan(q, k, k, **options)
        o = plan.run()
        assert o.shape == q.shape and np.all(o == (k_len > 0)), name
        assert plan.pairs().shape == (batch, 2, q_len, k_len)
        if METHODS[name].params and not batch * q_len * k_len:
            with pytest.raises(ValueError, match="density 0.5 cannot be reached: no query sees a"):
                sparge.plan(q, k, k, density=0.5, **options)


X = np.random.default_rng(0).standard_normal((2, 64, 16)).astype(np.float32)


@pytest.mark.parametrize("options, message", [
    ({"method": "xatention"}, "method is 'xatention', it must be one of '"),
    ({"method": "xattention:tau=2"}, "tau of xattention is 2, it must be in [0, 1]"),
    ({"method": "xattention:stride=2.5"}, "stride of xattention is 2.5, it must be a whole number"),
    ({"method": 5}, "method is a int, it must be a name or a Method"),
    ({"method": "xattention", "method_params": {"tau": "x"}}, "tau of xattention is 'x', it "
     "must be a number"),
    ({"density": "half"}, "density is 'half', it must be a number"),
    ({"method": "xattention:tau"}, "method is 'xattention:tau': 'tau' must be followed by = and a"),
    ({"method": "xattention:tau=1,tau=1"}, "method is 'xattention:tau=1,tau=1': 'tau' is there "
     "twice"),
    ({"method": "xattention", "method_params": {"taus": 1}}, "xattention has no parameter 'taus': "
     "it has 'tau'"),
    ({"method": "dense", "method_params": {"tau": 1}}, "dense has no parameters: leave out 'tau'"),
    ({"method": "xattention:tau=1", "method_params": {"tau": 1}}, "tau stands in method and in "
     "method_params: leave out one"),
    ({"method_params": {"tau": 1}}, "method_params is given and method is None: name the method"),
    ({"method": "xattention", "tau": 0.5, "sink": True}, "method is 'xattention', which has "
     "parameters of its own (method_params): leave out tau and sink"),
    ({"method": "xattention", "tau": 0, "lambda_": 0.0}, "leave out tau and lambda_"),
    ({"method": "xattention", "theta": np.zeros(2)}, "leave out theta"),
    ({"method": "xattention", "method_params": ["tau"]}, "method_params is ['tau'], it must be a "
     "dict of numbers by name"),
    ({"method_params": np.zeros(2)}, "method_params is given and method is None"),
    ({"method": "minference", "state": 1}, "state is a int, it must be a State"),
    ({"method": "xattention:tau=1", "density": 0.5}, "density finds tau of xattention: leave "
     "out one of them"),
    ({"method": "dense", "density": 0.5}, "dense has no parameter that sets its density"),
    ({"density": 0.5, "tau": 0.5}, "density finds tau: leave out tau"),
    ({"density": 0.5, "tau": 0}, "density finds tau: leave out tau"),
    ({"density": 0.5, "min_mass": 0.2, "cell": 8}, "density finds tau: leave out min_mass and "
     "cell"),
    ({"method": "submass", "min_mass": 0.2, "cell": 8}, "leave out min_mass and cell"),
    ({"density": 0.5, "theta": [0.1, 0.2]}, "density finds one tau for all heads: theta and "
     "lambda_ must be numbers"),
    ({"density": 0.0}, "density 0 cannot be reached: with tau from 0 to 1 it goes from 1 to 1; a "
     "lower theta or smaller blocks reach further down"),
    ({"method": "pbs"}, "pbs needs causal attention, and this is not causal"),
    ({"method": "dense", "grid": (2, 3, 4)}, "grid is (2, 3, 4), of 24 tokens, and there are 64 "
     "queries and 64 keys"),
    ({"method": "dense", "segment_ends": [10, 63]}, "segment_ends is [10, 63], it must ascend to "
     "the 64 keys"),
    ({"method": "dense", "segment_ends": 64}, "segment_ends is 64, it must ascend to the 64 keys"),
    ({"method": "seer", "gate": 5}, "gate is 5, it must be a dict of 'k', and 'q' and 'rope_base'"),
    ({"method": "seer", "gate": {"k": X[:, :48], "Q": 1}}, "it must be a dict of 'k'"),
    ({"method": "seer", "gate": {"k": None}}, "it must be a dict of 'k'"),
    ({"method": "seer", "gate": {"k": "x"}}, "gate['k'] is 'x', it must be an array"),
    ({"method": "seer", "gate": {"k": X}}, "gate['k'] has the shape [2, 64, 16], it must be [2, "
     "48, hidden]"),
    ({"method": "seer", "gate": {"k": X[:, :48], "q": X[:, :16, :8]}}, "gate['q'] has the shape "
     "[2, 16, 8], it must be [2, 16, 16]"),
    ({"method": "seer", "gate": {"k": X[:, :48], "rope_base": "x"}}, "rope_base of the gate is "
     "'x', it must be a number"),
    ({"method": "seer", "gate": {"k": X[:, :48], "rope_base": 0.5}}, "rope_base is 0.5, it must "
     "be 0 or at least 1"),
    ({"method": "seer", "gate": {"k": X[:, :48] * np.inf}}, "gate holds a number that is not "
     "finite"),
    ({"method": "dense", "layer": 1.5}, "layer is 1.5, it must be a whole number"),
])
def test_what_is_wrong_is_said(options, message):
    with pytest.raises((ValueError, TypeError, NotImplementedError)) as error:
        sparge.attention(X, X, X, **options)
    assert message in str(error.value)


def test_rules_of_a_file_name_the_method(tmp_path):
    file = tmp_path / "params.json"
    sparge.tune([(X, X, X)], l1=0.08, l2=0.09).save(file)
    file.write_text(file.read_text().replace('"rules": "default"', '"rules": "paper"'))
    params = sparge.load_params(file)
    plan = sparge.plan(X, X, X, params=params, backend="ref")
    assert plan.method.name == "spargeattn_paper"
    assert np.array_equal(plan.run(), sparge.attention(X, X, X, params=params, backend="ref"))


def test_values_are_asked_for():
    with pytest.raises(TypeError, match="v is None and method is 'xattention', which may look"):
        sparge.predict(X, X, method="xattention")
    assert sparge.predict(X, X, X, method="xattention").shape == (2, 1, 1)
