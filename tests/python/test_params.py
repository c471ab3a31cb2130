# SPDX-License-Identifier: Apache-2.0
"""Thresholds of files: what is read and refused, beside what `sparge run --params` does with the
same file."""
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import sparge
from safetensors.numpy import load_file

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
TUNED = EXPERIMENTS / "tune/params_0.08_0.09.json"
CAPTURE = EXPERIMENTS / "capture/smollm2-135m/layer06_group2.safetensors"
LEFT_OUT = object()


@pytest.fixture(scope="module")
def qkv():
    """Three heads of one key head, as layer 6 of the committed capture has, of 1024 tokens."""
    return [x[:, :, 1024:2048].astype(np.float32) for x in map(load_file(CAPTURE).get, "qkv")]


@pytest.fixture
def document():
    """Of one layer with heads 0 to 2, that the tests change."""
    found = json.loads(TUNED.read_text())
    heads = [{**h, "head": n} for n, h in enumerate(found["heads"][:3])]
    return found | {"cell": 0, "heads": heads}


def written(document, folder):
    path = folder / "params.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def run(program, folder, qkv, *options):
    """The program's exit code and what it said; o is folder/o.npy."""
    files = [folder / f"{name}.npy" for name in "qkv"]
    for file, x in zip(files, qkv):
        np.save(file, x)
    done = subprocess.run([program, "run", *files, "-o", folder / "o.npy", *map(str, options)],
                          capture_output=True, text=True)
    return done.returncode, done.stderr.strip()


# ---- Use --------------------------------------------------------------------------------------


def test_what_is_in_a_file():
    params = sparge.load_params(TUNED)
    assert (params.model, params.layers) == ("SmolLM2-135M-Instruct", (6, 12, 21))
    layer = params.layer(6)
    first = json.loads(TUNED.read_text())["heads"][0]
    assert (layer.heads, layer.theta[0]) == ((6, 7, 8), np.float32(first["theta"]))
    assert (layer.topk == -1).all() and (layer.min_mass == 0).all()
    assert layer.lambda_[0] == -np.inf and first["lambda"] is None
    chosen = params.layer(6, [8, 6])
    assert chosen.heads == (8, 6) and chosen.tau.tolist() == layer.tau[[2, 0]].tolist()


@pytest.mark.parametrize("layer, heads", [(7, None), (6, [6, 9])])
def test_what_is_not_in_a_file(layer, heads):
    with pytest.raises(LookupError, match=f"layer {layer} head {heads[1] if heads else 0}"):
        sparge.load_params(TUNED).layer(layer, heads)


def test_a_call_is_as_it_was_tuned(qkv):
    """What is not said is taken from the file; the heads get their own thresholds."""
    layer = sparge.load_params(TUNED).layer(6)
    got = sparge.attention(*qkv, params=layer, return_mask=True)
    want = sparge.attention(*qkv, is_causal="end", sink=True, theta=layer.theta, tau=layer.tau,
                            lambda_=layer.lambda_, return_mask=True)
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_array_equal(got[1].blocks, want[1].blocks)
    same = sparge.attention(*qkv, params=sparge.load_params(TUNED).layer(6, [6, 6, 6]))
    assert (same[0, 0] == got[0][0, 0]).all() and not (same[0, 1] == got[0][0, 1]).all()


def test_a_file_of_one_layer_is_enough(qkv, document, tmp_path):
    params = sparge.load_params(written(document, tmp_path))
    np.testing.assert_array_equal(sparge.attention(*qkv, params=params),
                                  sparge.attention(*qkv, params=params.layer(6)))
    with pytest.raises(ValueError, match="has 3 layers, a call is of one"):
        sparge.attention(*qkv, params=sparge.load_params(TUNED))


def test_what_a_call_may_not_give(qkv):
    layer = sparge.load_params(TUNED).layer(6)
    q, k, v = qkv
    for more, said in (({"theta": 0.5}, "leave out theta"),
                       ({"params": "file.json"}, "params is a str")):
        with pytest.raises((ValueError, TypeError), match=said):
            sparge.attention(q, k, v, **{"params": layer, **more})
    with pytest.raises(ValueError, match=r"3 heads \(6, 7, 8\), and q has 2"):
        sparge.attention(q[:, :2], k, v, params=layer)


# What a call says, on the command line and here; and does the file agree?
SAID = [
    (["--rules", "paper"], {"rules": "paper"}, False),
    (["--block-q", 64], {"block": (64, 64)}, False),
    (["--block-k", 128], {"block": (128, 128)}, False),
    (["--cell", 8], {"cell": 8}, False),
    (["--cell", 0], {"cell": 0}, True),
    (["--skip-rows", 32], {"skip_rows": 32}, False),
    (["--skip-rows", 64], {"skip_rows": 64}, True),
    (["--causal=start"], {"is_causal": "start"}, False),
    (["--causal"], {"is_causal": "end"}, True),
    (["--no-smooth-k"], {"smooth_k": False}, False),
    (["--sink"], {"sink": True}, True),
    (["--softmax-scale", 0.1], {"softmax_scale": 0.1}, False),
    (["--qk-dtype", "f32"], {"qk_dtype": "f32"}, True),
    (["--backend", "ref"], {"backend": "ref"}, True),
    ([], {}, True),
]


@pytest.mark.parametrize("words, arguments, agree", SAID)
def test_options_beside_the_program(program, qkv, document, tmp_path, words, arguments,
                                    agree):
    path = written(document, tmp_path)
    params = sparge.load_params(path)
    code, said = run(program, tmp_path, qkv, "--params", path, "--layer", 6, *words)
    if agree:
        assert code == 0, said
        o = sparge.attention(*qkv, params=params, **arguments)
        np.testing.assert_array_equal(o, np.load(tmp_path / "o.npy"))
        return
    assert code != 0 and "was tuned with" in said
    with pytest.raises(ValueError, match="was tuned with") as error:
        sparge.attention(*qkv, params=params, **arguments)
    assert str(path) in str(error.value) and next(iter(arguments)) in str(error.value)


def test_min_mass_by_cells(program, qkv, document, tmp_path):
    """As the program has it, and as a call that says the same."""
    document["cell"] = 16
    document["heads"] = [{**h, "theta": -1, "tau": None, "min_mass": 0.2 + 0.3 * n}
                         for n, h in enumerate(document["heads"])]
    path = written(document, tmp_path)
    params = sparge.load_params(path)
    assert params.options["cell"] == 16 and params.layer(6).tau.tolist() == [-1, -1, -1]
    code, said = run(program, tmp_path, qkv, "--params", path, "--layer", 6)
    o, mask = sparge.attention(*qkv, params=params, return_mask=True)
    assert code == 0, said
    np.testing.assert_array_equal(o, np.load(tmp_path / "o.npy"))
    layer = params.layer(6)
    options = {"is_causal": "end", "sink": True, "theta": -1, "lambda_": layer.lambda_, "cell": 16}
    np.testing.assert_array_equal(
        o, sparge.attention(*qkv, min_mass=[0.2, 0.5, 0.8], **options))
    assert mask.density < 0.9
    flat = params.changed(min_mass=0.2)
    np.testing.assert_array_equal(sparge.attention(*qkv, params=flat),
                                  sparge.attention(*qkv, min_mass=0.2, **options))


def test_what_none_and_0_stand_for_is_compared(qkv, document, tmp_path):
    """1/sqrt(D) of 48 channels is no float; skip_rows of 0 is 64."""
    q, k, v = (x[..., :48] for x in qkv)
    params = sparge.load_params(written(document, tmp_path))
    assert document["softmax_scale"] is None
    np.testing.assert_allclose(
        sparge.attention(q, k, v, params=params, softmax_scale=48**-0.5, skip_rows=0),
        sparge.attention(q, k, v, params=params), rtol=1e-3)  # the scale's last bit may differ
    document["skip_rows"] = 32
    params = sparge.load_params(written(document, tmp_path))
    with pytest.raises(ValueError, match="skip_rows 32, not 64"):
        sparge.attention(q, k, v, params=params, skip_rows=0)


def test_what_no_option_of_the_program_says(qkv):
    layer = sparge.load_params(TUNED).layer(6)
    for name, value, said in (("sink", False, "sink True, not False"),
                              ("is_causal", False, "is_causal 'end', not False")):
        with pytest.raises(ValueError, match=said):
            sparge.attention(*qkv, params=layer, **{name: value})


# ---- What is refused --------------------------------------------------------------------------

WRONG = [
    ("sparge_params", 2), ("sparge_params", 1.0), ("sparge_params", True), ("model", 3),
    ("model", LEFT_OUT), ("weights_sha256", 3), ("rules", "none"), ("rules", None), ("block_q", 0),
    ("block_k", 1025), ("cell", -1), ("cell", 8.0), ("cell", None), ("skip_rows", "64"),
    ("causal", "middle"), ("causal", LEFT_OUT),
    ("smooth_k", 1), ("sink", None), ("softmax_scale", -1.0), ("softmax_scale", LEFT_OUT),
    ("heads", {}), ("heads", LEFT_OUT),
    # and of a head:
    ("layer", -1), ("head", 2**31), ("head", 1.5), ("dense", 0), ("theta", 1.01), ("theta", None),
    ("theta", True), ("theta", LEFT_OUT), ("tau", 1.5), ("tau", "0.9"), ("tau", None),
    ("topk", -0.5), ("min_mass", -0.1), ("min_mass", True), ("min_mass", "0.2"), ("lambda", 0.5),
    ("lambda", -1e31),
]


def test_numbers_beyond_float32(document):
    for key, value in (("tau", 1e99), ("topk", 10**400), ("theta", -10**400)):
        document["heads"][1][key] = value
        with pytest.raises(ValueError, match=f"{key}' must be a number in"):
            sparge.Params(document)
        document["heads"][1][key] = 0.5
    document["heads"][1].update(tau=None, topk=None, min_mass=1e-60)  # 0 in float32
    with pytest.raises(ValueError, match="tau' must be a number where topk and min_mass are null"):
        sparge.Params(document)
    with pytest.raises(ValueError, match="params: is no JSON object"):
        sparge.Params([document])


@pytest.mark.parametrize("key, value", WRONG)
def test_the_sentences_of_the_program(program, qkv, document, tmp_path, key, value):
    """A wrong value is refused, and by the same words."""
    holder = document if key in document else document["heads"][1]
    holder[key] = value
    if value is LEFT_OUT:
        del holder[key]
    path = written(document, tmp_path)
    code, said = run(program, tmp_path, qkv, "--params", path, "--layer", 6)
    with pytest.raises(ValueError, match=key) as error:
        sparge.load_params(path)
    assert code != 0 and said == f"sparge: {error.value}"


@pytest.mark.parametrize("text", ["", "[1]", '{"sparge_params": 1', '{"a": 1, "a": 2}', "\xff",
                                  "[" * 100000])
def test_what_is_no_such_file(program, qkv, tmp_path, text):
    path = tmp_path / "params.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match="params.json: "):
        sparge.load_params(path)
    assert run(program, tmp_path, qkv, "--params", path, "--layer", 6)[0] != 0


def test_a_key_or_a_head_twice(document, tmp_path):
    with pytest.raises(ValueError, match="params.json: has a key twice"):
        sparge.load_params(written(json.dumps(document)[:-1] + ', "sink": true}', tmp_path))
    document["heads"].append(document["heads"][0])
    with pytest.raises(ValueError, match="has layer 6 head 0 twice"):
        sparge.load_params(written(document, tmp_path))
    with pytest.raises(FileNotFoundError):
        sparge.load_params(tmp_path / "none.json")


# ---- Writing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tune/params_0.08_0.09.json", "tune/model_worst.json",
                                  "video/params.json"])
def test_a_file_is_written_as_it_was(tmp_path, name):
    sparge.load_params(EXPERIMENTS / name).save(tmp_path / "copy.json")
    assert (tmp_path / "copy.json").read_bytes() == (EXPERIMENTS / name).read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["copy.json"]


def test_links_and_devices_stay(tmp_path):
    (tmp_path / "link.json").symlink_to("far.json")
    params = sparge.load_params(TUNED)
    params.save(tmp_path / "link.json")
    assert (tmp_path / "link.json").is_symlink()
    assert (tmp_path / "far.json").read_bytes() == TUNED.read_bytes()
    os.mkfifo(tmp_path / "pipe")
    end = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    params.changed(tau=0.5).save(tmp_path / "pipe")
    assert b'"tau": 0.5' in os.read(end, 1 << 16) and (tmp_path / "pipe").is_fifo()
    os.close(end)
    with pytest.raises(IsADirectoryError):
        params.save(tmp_path)


def test_thresholds_for_all_heads():
    params = sparge.load_params(TUNED)
    new = params.changed(theta=-1.0, lambda_=None)
    assert (new.layer(6).theta == -1).all() and (new.layer(6).lambda_ == -np.inf).all()
    assert new.layer(6).tau.tolist() == params.layer(6).tau.tolist()
    assert params.layer(6).theta[2] > 0  # it is a copy
    with pytest.raises(ValueError, match="'heads.0..tau' must be a number in"):
        params.changed(tau=2.0)
    with pytest.raises(TypeError, match="'sink'"):
        params.changed(sink=1.0)
