# SPDX-License-Identifier: Apache-2.0
"""Tensors on a GPU, by a stand-in for torch. In the build's package the device is the model of
tests/cuda_model, whose memory and streams are not the host's; a wheel has no cuda backend."""
import ctypes
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest

import sparge
from sparge._native import call, ffi, lib

BUILT = lib.sparge_backend_built(lib.SPARGE_CUDA)
on_model = pytest.mark.skipif(not BUILT, reason="of the package on the model of a GPU")

# ---- The stand-in for torch -------------------------------------------------------------------


class Dtype(str):
    """torch.float32 and others."""

    def __str__(self):
        return "torch." + self


class Memory:
    """Device memory. Torch reuses what is freed in the order of the stream; here nothing is freed
    before its queue is empty."""

    def __init__(self, torch, size):
        at = ffi.new("void **")
        call(lib.sparge_device_alloc, max(1, size), at)
        self.torch, self.at = torch, int(ffi.cast("intptr_t", at[0]))
        self.write(b"\xff" * size)  # NaN, until something is written

    def write(self, data):
        call(lib.sparge_device_copy, ffi.cast("void *", self.at), ffi.from_buffer(data), len(data))

    def read(self, size):
        data = bytearray(size)
        call(lib.sparge_device_copy, ffi.from_buffer(data), ffi.cast("void *", self.at), size)
        return bytes(data)

    def __del__(self):
        self.torch.stream.synchronize()
        lib.sparge_device_free(ffi.cast("void *", self.at))


class Tensor:
    """A tensor of torch on CUDA, as far as the package looks."""

    requires_grad = False

    def __init__(self, torch, shape, dtype, device="cuda:0"):
        self.torch, self.shape, self.dtype, self.device = torch, tuple(shape), dtype, device
        self.host = np.empty(shape, np.dtype(str.__str__(dtype)))
        self.memory = Memory(torch, self.host.nbytes)

    def stride(self):
        return tuple(step // self.host.itemsize for step in self.host.strides)

    def data_ptr(self):
        return self.memory.at

    def contiguous(self):
        return self

    def detach(self):
        return self

    def new_empty(self, shape, *, dtype):
        return Tensor(self.torch, shape, dtype, self.device)

    def at_once(self):
        """What stands in its memory now, whatever is still queued."""
        return np.frombuffer(ctypes.string_at(self.memory.at, self.host.nbytes),
                             self.host.dtype).reshape(self.shape)

    def cpu(self):
        self.torch.stream.synchronize()
        data = self.memory.read(self.host.nbytes)
        return np.frombuffer(data, self.host.dtype).reshape(self.shape)


class Torch(SimpleNamespace):
    """The module."""

    float32, float16, uint8 = Dtype("float32"), Dtype("float16"), Dtype("uint8")

    def __init__(self):
        self.current = []  # devices that were made the current one
        self.stream = SimpleNamespace(cuda_stream=0, synchronize=lambda: None)
        self.cuda = SimpleNamespace(current_stream=lambda device: self.stream, device=self.device)

    @contextmanager
    def device(self, device):
        self.current.append(device)
        yield

    def is_grad_enabled(self):
        return True

    def new_stream(self):
        """A stream of the model, whose work runs when somebody waits for it."""
        model = ctypes.CDLL(sys.modules["sparge._sparge"].__file__)
        model.model_stream.restype = ctypes.c_void_p
        handle = model.model_stream()

        def synchronize():
            assert model.model_synchronize(ctypes.c_void_p(handle)) == 0

        self.stream = SimpleNamespace(cuda_stream=handle, synchronize=synchronize)

    def tensor(self, x, device="cuda:0"):
        made = Tensor(self, x.shape, getattr(self, x.dtype.name), device)
        made.memory.write(x.tobytes())
        return made


@pytest.fixture
def torch(monkeypatch):
    module = Torch()
    monkeypatch.setitem(sys.modules, "torch", module)
    return module


def arrays(*shape, kv_heads=None, dtype=np.float32, seed=1):
    """q, k and v [..., H, N, D]; k and v have other heads than q."""
    rng = np.random.default_rng(seed)
    shapes = [shape] + [(*shape[:-3], kv_heads or shape[-3], *shape[-2:])] * 2
    return [rng.standard_normal(s, dtype=np.float32).astype(dtype) for s in shapes]


EXACT = [  # kernels whose answers are ref's bits
    {"kernel": 1, "qk_dtype": "f32", "pv_dtype": "f32"},
    {"kernel": 2, "qk_dtype": "f32", "pv_dtype": "f32"},
    {"kernel": 3},
    {"kernel": 0},
]


def on_ref(x, function=sparge.attention, *rest, **options):
    options.pop("kernel", None)
    return function(*x, *rest, backend="ref", **options)


# ---- Attention --------------------------------------------------------------------------------


@on_model
@pytest.mark.parametrize("kernel", EXACT)
@pytest.mark.parametrize("shape", [(2, 200, 64), (2, 2, 130, 32)])
def test_the_bits_of_ref(torch, shape, kernel):
    x = arrays(*shape, kv_heads=1)
    options = dict(kernel, is_causal=True, tau=0.9, lambda_=-3, theta=[0.2, 0.3])
    want = on_ref(x, return_lse=True, return_mask=True, return_stats=True, **options)
    got = sparge.attention(*map(torch.tensor, x), return_lse=True, return_mask=True,
                           return_stats=True, **options)
    for tensor, array in zip(got[:2], want[:2]):
        assert isinstance(tensor, Tensor) and tensor.device == "cuda:0"
        assert tensor.shape == array.shape and tensor.cpu().tobytes() == array.tobytes()
    assert isinstance(got[2], sparge.BlockMask)
    assert np.array_equal(got[2].blocks, want[2].blocks)
    assert got[3].counts == want[3].counts and got[3].head_counts == want[3].head_counts
    assert (got[3].backend, want[3].backend) == ("cuda", "ref")
    assert set(torch.current) == {"cuda:0"}


@on_model
def test_half_and_layout(torch):
    x = arrays(3, 100, 64, dtype=np.float16)
    want = on_ref(x, qk_dtype="f32", pv_dtype="f32")
    turned = [torch.tensor(np.ascontiguousarray(a.transpose(1, 0, 2))) for a in x]
    got = sparge.attention(*turned, layout="NHD", kernel=2, qk_dtype="f32", pv_dtype="f32")
    assert got.dtype == "float16"
    assert got.cpu().transpose(1, 0, 2).tobytes() == want.tobytes()


@on_model
def test_a_bias_of_keys(torch):
    x = arrays(2, 100, 64)
    bias = np.linspace(-3, 1, 200, dtype=np.float32).reshape(2, 100)
    got = sparge.attention(*map(torch.tensor, x), k_bias=torch.tensor(bias))
    assert got.cpu().tobytes() == on_ref(x, k_bias=bias).tobytes()
    with pytest.raises(ValueError, match="k_bias is on cpu and q is on cuda:0"):
        sparge.attention(*map(torch.tensor, x), k_bias=bias)


@on_model
def test_given_masks(torch):
    x = arrays(2, 300, 64)
    on_device = [torch.tensor(a) for a in x]
    mask = sparge.predict(*on_device[:2], tau=0.5, theta=-1)
    assert np.array_equal(mask.blocks, on_ref(x[:2], sparge.predict, tau=0.5, theta=-1).blocks)
    assert mask.density < 1
    want = on_ref(x, sparge.attend, mask)
    blocks = mask.blocks.astype(np.uint8)
    for given in (mask, blocks, torch.tensor(blocks)):
        assert sparge.attend(*on_device, given).cpu().tobytes() == want.tobytes()
    got = sparge.attend(*on_device, None).cpu()
    assert got.tobytes() == on_ref(x, sparge.attend, None).tobytes() != want.tobytes()


@on_model
def test_the_judge_brings_tensors_to_the_host(torch):
    x = [torch.tensor(a) for a in arrays(1, 100, 32)]
    o, mask = sparge.attention(*x, return_mask=True, qk_dtype="f32", pv_dtype="f32", kernel=2)
    assert sparge.check(o, *x, mask=mask).ok


# ---- Streams ----------------------------------------------------------------------------------


@on_model
def test_a_call_is_queued_on_the_stream(torch):
    x = arrays(2, 200, 64)
    want = on_ref(x, return_lse=True)
    on_device = [torch.tensor(a) for a in x]
    torch.new_stream()
    o, lse = sparge.attention(*on_device, return_lse=True)
    assert np.isnan(o.at_once()).all() and np.isnan(lse.at_once()).all()  # not yet
    assert o.cpu().tobytes() == want[0].tobytes() and lse.cpu().tobytes() == want[1].tobytes()


@on_model
def test_what_comes_to_the_host_waits_for_the_stream(torch):
    x = arrays(2, 200, 64)
    want = on_ref(x, return_mask=True, return_stats=True, tau=0.5, theta=-1)
    on_device = [torch.tensor(a) for a in x]
    torch.new_stream()
    got = sparge.attention(*on_device, return_mask=True, return_stats=True, tau=0.5, theta=-1)
    assert np.array_equal(got[1].blocks, want[1].blocks)
    assert got[2].head_counts == want[2].head_counts and got[2].counts == want[2].counts
    mask = sparge.predict(*on_device[:2], tau=0.5, theta=-1)
    assert np.array_equal(mask.blocks, want[1].blocks)


@on_model
def test_a_mask_lives_until_the_stream_has_read_it(torch):
    x = arrays(2, 200, 64)
    mask = on_ref(x[:2], sparge.predict, tau=0.5, theta=-1)
    want = on_ref(x, sparge.attend, mask)
    on_device = [torch.tensor(a) for a in x]
    torch.new_stream()
    o = sparge.attend(*on_device, mask)
    del mask
    assert o.cpu().tobytes() == want.tobytes()


@on_model
def test_a_stream_that_is_none(torch):
    x = [torch.tensor(a) for a in arrays(2, 200, 64)]
    torch.stream.cuda_stream = 0x1234
    with pytest.raises(RuntimeError, match="invalid resource handle"):
        sparge.attention(*x)
    torch.stream.cuda_stream = 0
    sparge.attention(*x)


# ---- What is refused --------------------------------------------------------------------------


class Foreign(Tensor):
    """A tensor that says it is on a device, and whose memory nobody may look at."""

    def __init__(self, torch, shape, dtype=Torch.float32, device="cuda:0"):
        self.torch, self.shape, self.dtype, self.device = torch, tuple(shape), dtype, device
        self.host = np.empty(shape, np.dtype(str.__str__(dtype)))
        self.memory = SimpleNamespace(at=64)

    def new_empty(self, shape, *, dtype):
        return Foreign(self.torch, shape, dtype, self.device)


def test_mixed_devices(torch):
    shape = (2, 64, 32)
    here, there = Foreign(torch, shape), Foreign(torch, shape, device="cuda:1")
    host = np.ones(shape, np.float32)
    for k, v, what in ((there, here, "k is on cuda:1 and q is on cuda:0"),
                       (here, host, "v is on cpu and q is on cuda:0")):
        with pytest.raises(ValueError, match=what):
            sparge.attention(here, k, v)
    with pytest.raises(ValueError, match="k is on cuda:0 and q is on cpu"):
        sparge.attention(host, here, here)


@pytest.mark.parametrize("backend", ["ref", "cpu"])
def test_backends_of_the_other_side(torch, backend):
    x = Foreign(torch, (2, 64, 32))
    with pytest.raises(ValueError, match=f"q is on cuda:0 and backend is '{backend}'"):
        sparge.attention(x, x, x, backend=backend)
    host = np.ones((2, 64, 32), np.float32)
    with pytest.raises(ValueError, match="q is on cpu and backend is 'cuda'"):
        sparge.attention(host, host, host, backend="cuda")


def test_gradients(torch):
    x = Foreign(torch, (2, 64, 32))
    x.requires_grad = True
    with pytest.raises(ValueError, match="q.requires_grad is True, it must be False"):
        sparge.attention(x, x, x)


ON_HOST = {
    "oracle": lambda x: sparge.oracle(x, x, x),
    "intermediates": lambda x: sparge.intermediates(x, x, x),
    "plan": lambda x: sparge.plan(x, x, x, method="xattention"),
    "tune": lambda x: sparge.tune([(x, x, x)], l1=0.1, l2=0.2),
}


@pytest.mark.parametrize("function", ON_HOST)
def test_what_runs_on_the_host_alone(torch, function):
    with pytest.raises(ValueError, match="q.* is on cuda:0"):
        ON_HOST[function](Foreign(torch, (2, 64, 32)))


@on_model
def test_memory_of_the_host(torch):
    x = [torch.tensor(a) for a in arrays(2, 64, 32)]
    host = np.ones((2, 64, 32), np.float32)
    x[1].memory = SimpleNamespace(at=host.ctypes.data)
    with pytest.raises(ValueError, match="k.data points to host memory"):
        sparge.attention(*x)


@pytest.mark.skipif(BUILT, reason="of the package without a device")
def test_a_wheel_without_cuda(torch):
    x = Foreign(torch, (2, 64, 32))
    for use in (lambda: sparge.attention(x, x, x, return_mask=True, return_stats=True),
                lambda: sparge.predict(x, x), lambda: sparge.attend(x, x, x, None)):
        with pytest.raises(NotImplementedError, match="cuda, which this library was built without"):
            use()
