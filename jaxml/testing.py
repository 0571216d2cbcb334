"""For tests: tolerances from dtype and reduction length, models that are instant, devices that are not there."""

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
import subprocess
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxml.lm.config import DecoderConfig
from jaxml.parallel import topology
from jaxml.parallel.topology import without_compilation_cache
from jaxml.target import target


def tolerance(dtype, reduction: int = 1) -> float:
    """An absolute bound for values of order 1 that sum `reduction` rounded terms of `dtype`.

    Example:
        >>> tolerance("float32", 64) < 1e-5
        True
    """
    return float(8 * jnp.finfo(dtype).eps * math.sqrt(reduction))


def tiny_config(**fields) -> DecoderConfig:
    """A Llama of two layers and width 32, with any field replaced.

    Example:
        >>> config = tiny_config(num_layers=3)
        >>> config.num_layers, config.width, config.family
        (3, 32, 'llama')
    """
    config = DecoderConfig(
        family="llama",
        vocab_size=64,
        width=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        hidden_dim=48,
        max_length=128,
        bos_id=1,
        eos_ids=(2,),
        pad_id=0,
    )
    return dataclasses.replace(config, **fields)


def tiny_tokenizer(vocab_size: int = 64, chat_template: str | None = None):
    """One token a character: 0 padding, 1 begin, 2 end, then letters, digits and punctuation.

    Example:
        >>> tokenizer = tiny_tokenizer()
        >>> tokenizer.encode("a cab"), tokenizer.decode([6, 4, 5])
        ([4, 3, 6, 4, 5], 'cab')
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    from jaxml.lm.tokenizer import Tokenizer

    letters = " abcdefghijklmnopqrstuvwxyz0123456789.,?!:;'-\n<>|/_ABCDEFGHIJ"
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2} | {c: i + 3 for i, c in enumerate(letters[: vocab_size - 3])}
    backend = Backend(models.WordLevel(vocab=vocab, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(["<pad>", "<s>", "</s>"])
    return Tokenizer(backend, bos_id=1, eos_ids=(2,), pad_id=0, chat_template=chat_template)


def tiny_model(seed: int = 0, **fields):
    """A random model with `tiny_config` and `tiny_tokenizer`, its logits spread enough to be told apart.

    Example:
        >>> from jaxml.lm import decoder
        >>> model = tiny_model(num_layers=1)
        >>> tokens = jnp.array([model.tokenizer.encode("fox")])
        >>> x = decoder.hidden(model.params, model.config, tokens, positions=jnp.arange(3)[None])
        >>> logits = decoder.logits(model.params, model.config, x)
        >>> logits.shape, bool(logits.std() > 1)
        ((1, 3, 64), True)
    """
    from jaxml.lm import decoder
    from jaxml.lm.model import Model

    config = tiny_config(**fields)
    params = decoder.init(jax.random.key(seed), config)
    params = jax.tree.map(lambda w: w * 8 if w.ndim > 2 else w, params)
    params["embed"] = params["embed"] * 25
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    template += "{% if add_generation_prompt %}<assistant>{% endif %}"
    return Model(params, config, tiny_tokenizer(config.vocab_size, template))


@dataclasses.dataclass
class TinyEncoder:
    """An encoder that is instant, in the place of `lm.encoder.Encoder`: a vector of hashed words.

    Example:
        >>> vectors = TinyEncoder()(["the cat", "a cat", "dogs"])
        >>> bool(vectors[0] @ vectors[1] > vectors[0] @ vectors[2])
        True
    """

    width: int = 64
    seed: int = 0
    tokenizer = SimpleNamespace(bos_id=0, eos_ids=(), add_bos=False, chat_template=None, vocab_size=1)

    @property
    def config(self) -> SimpleNamespace:
        return SimpleNamespace(width=self.width, seed=self.seed)

    @property
    def params(self) -> dict[str, Any]:
        return {}

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        out = np.zeros((len(texts), self.width), np.float32)
        for row, text in zip(out, texts):
            for word in text.lower().split():
                row[zlib.crc32(f"{self.seed}{word.strip('.,?')}".encode()) % self.width] += 1
        return out / np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-9)


TPU_TOPOLOGIES = {
    "v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1",
}  # fmt: skip


def compile_for_tpu(function, arguments, chip: str, donate: tuple[int, ...] = ()):
    """`function` compiled for one chip of a TPU generation, on any machine that has libtpu (`jaxml[tpu]`).

    Args:
        function: a pure function of `arguments`; kernels in it are those for TPUs, with that chip's blocks.
        arguments: a sequence of pytrees of `jax.ShapeDtypeStruct` (arrays do as well).
        chip: "v4", "v5e", "v5p", "v6e" or "tpu7x".
        donate: numbers of the arguments whose memory the results may take.

    Returns:
        What `jit(function).lower(...).compile()` returns: `memory_analysis()`, `cost_analysis()`, `as_text()`.

    Example:
        >>> from jaxml.extras import version
        >>> x = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16)
        >>> if version("libtpu"):  # jaxml[tpu]
        ...     compiled = compile_for_tpu(jnp.matmul, [x, x], "v5e")
        ...     assert compiled.memory_analysis().output_size_in_bytes == 2 * x.size
    """
    from jax.sharding import SingleDeviceSharding

    device = _tpus(chip)[0]
    sharding = SingleDeviceSharding(device)
    place = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)
    with _as_on(device.device_kind, 1, "tpu"), target(f"TPU {chip}"), without_compilation_cache():
        return jax.jit(function, donate_argnums=donate).lower(*jax.tree.map(place, tuple(arguments))).compile()


def lower_for_gpu(function, arguments):
    """`function` lowered for an NVIDIA H100, on any machine: what jaxml's kernels become, before CUDA's own compiler.

    Args:
        function: a pure function of `arguments`; kernels in it are those for GPUs.
        arguments: a sequence of pytrees of `jax.ShapeDtypeStruct` (arrays do as well).

    Returns:
        What `jit(function).lower(...)` returns: `as_text()`.

    Example:
        >>> from jaxml.attention import flash_attention
        >>> x = jax.ShapeDtypeStruct((1, 128, 2, 64), jnp.bfloat16)
        >>> attend = lambda q, k, v: flash_attention(q, k, v, implementation="mosaic_gpu")
        >>> "flash_attention_forward" in lower_for_gpu(attend, [x, x, x]).as_text()
        True
    """
    with _as_on("NVIDIA H100", 132, "gpu"), target("NVIDIA H100"):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))


# Of GPUs that `compile_for_gpu` knows: architecture, processors, shared memory of each and of a program, in bytes.
GPUS = {
    "NVIDIA A100": ("sm_80", 108, 167936, 166912),
    "NVIDIA H100": ("sm_90a", 132, 233472, 232448),
    "NVIDIA B200": ("sm_100a", 148, 233472, 232448),
}


@dataclasses.dataclass(frozen=True)
class GpuKernel:
    """What CUDA's assembler says of a kernel.

    Example:
        >>> log = "Compiling entry function 'attend' for 'sm_90a': 0 bytes spill stores, Used 168 registers"
        >>> _kernels(log)
        [GpuKernel(name='attend', registers=168, spilled=0, serialized=False)]
    """

    name: str
    registers: int  # of a thread, when the kernel begins
    spilled: int  # bytes
    serialized: bool = False  # whether products for Hopper's tensor cores wait for each other


def compile_for_gpu(function, arguments, device_kind: str = "NVIDIA H100") -> tuple[Any, list[GpuKernel]]:
    """`function` compiled for a GPU, on any machine that has CUDA's plugin for JAX and its assembler, ptxas.

    The plugin: ``pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt``, of JAX's own version.

    Args:
        function: a pure function of `arguments`; kernels in it are those for that GPU.
        arguments: a sequence of pytrees of `jax.ShapeDtypeStruct` (arrays do as well).
        device_kind: of `GPUS`.

    Returns:
        (what `jit(function).lower(...).compile()` returns, the kernels written in Triton or Mosaic GPU that are in it).
        Kernels that jax-triton calls are assembled by the assembler that comes with Triton.

    Example:
        >>> import shutil
        >>> from jaxml.attention import flash_attention
        >>> x = jax.ShapeDtypeStruct((1, 128, 2, 64), jnp.bfloat16)
        >>> attend = lambda q, k, v: flash_attention(q, k, v, implementation="mosaic_gpu")
        >>> if shutil.which("ptxas") and importlib.util.find_spec("jax_plugins"):
        ...     _, kernels = compile_for_gpu(attend, [x, x, x])
        ...     assert [kernel.spilled for kernel in kernels] == [0]
    """
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    jax.devices()  # has JAX find its plugins
    topology = topologies.get_topology_desc("", "cuda", target_config=_gpu_config(device_kind), topology="1x1x1")
    sharding = SingleDeviceSharding(topology.devices[0])
    place = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)
    with target(device_kind), without_compilation_cache(), tempfile.TemporaryDirectory() as folder:
        triton, mosaic, called = (Path(folder, name) for name in ("triton", "mosaic", "called"))
        mosaic.mkdir()
        with _environment(MOSAIC_GPU_DUMP_PTXAS="1", MOSAIC_GPU_DUMP_TO=str(mosaic)), _jax_triton_dumps(called):
            lowered = jax.jit(function).trace(*jax.tree.map(place, tuple(arguments))).lower()
            compiled = lowered.compile(compiler_options={"xla_dump_to": str(triton)})
        files = [file for file in sorted(triton.glob("*.ptx")) if ".entry" in file.read_text()]
        logs = [_assembled(file, device_kind, "ptxas") for file in files]
        logs += [_assembled(file, device_kind, _assembler_of_triton()) for file in called.glob("*/*.ptx")]
        logs += [file.read_text() for file in sorted(mosaic.glob("*.ptxas"))]
        return compiled, [kernel for log in logs for kernel in _kernels(log)]


@contextlib.contextmanager
def _environment(**variables: str):
    """Sets them for a while; what others set meanwhile stays, as where JAX finds Mosaic GPU's runtime."""
    old = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in old.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _jax_triton_dumps(folder: Path):
    """jax-triton, where it is installed, writes what it compiles to that folder."""
    if importlib.util.find_spec("jax_triton") is None:
        yield
        return
    from jax_triton import triton_lib

    old, triton_lib._JAX_TRITON_DUMP_DIR = triton_lib._JAX_TRITON_DUMP_DIR, str(folder)
    triton_lib._COMPILED_KERNEL_CACHE.clear()
    try:
        yield
    finally:
        triton_lib._JAX_TRITON_DUMP_DIR = old


def _assembler_of_triton() -> str:
    """The newest that comes with it: jax-triton has the newest language written."""
    import triton

    folder = Path(triton.__file__).parent / "backends/nvidia/bin"
    return str(max(folder.glob("ptxas*")))


def _assembled(ptx: Path, device_kind: str, assembler: str) -> str:
    command = [assembler, f"-arch={GPUS[device_kind][0]}", "-v", str(ptx), "-o", str(ptx.with_suffix(".cubin"))]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def _kernels(log: str) -> list[GpuKernel]:
    number = lambda pattern, text: int(re.search(pattern, text)[1])
    before, *parts = log.split("Compiling entry function '")
    return [
        GpuKernel(
            part.split("'")[0],
            number(r"Used (\d+) registers", part),
            number(r"(\d+) bytes spill stores", part),
            "serialized" in before,
        )
        for part in parts
    ]


def _gpu_config(device_kind: str) -> str:
    """XLA's description of a GPU, as text."""
    architecture, cores, shared, most = GPUS[device_kind]
    digits = re.search(r"\d+", architecture)[0]
    return f"""
      gpu_device_info {{
        threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048  fpus_per_core: 128
        block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
        shared_memory_per_block: 49152  shared_memory_per_core: {shared}  shared_memory_per_block_optin: {most}
        registers_per_core_limit: 65536  registers_per_block_limit: 65536
        core_count: {cores}  clock_rate_ghz: 1.98  l2_cache_size: 52428800
        memory_bandwidth: 3352320000000  device_memory_size: 84978434048
        cuda_compute_capability {{ major: {digits[:-1]} minor: {digits[-1]} }}
      }}
      platform_name: "CUDA"  dnn_version_info {{ major: 9 minor: 10 }}  device_description_str: "{device_kind}"
    """


def _as_on(device_kind: str, cores: int, platform: str):
    """A context in which JAX lowers kernels for a device that is not there."""
    from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

    device = AbstractDevice(device_kind=device_kind, num_cores=cores, platform=platform)
    return use_abstract_mesh(AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device))


def tpu_mesh(chip: str, axis_name: str) -> jax.sharding.Mesh:
    """A mesh of one axis over the chips of a small TPU that is not there: for shardings to compile with.

    Example:
        >>> from jaxml.extras import version
        >>> if version("libtpu"):  # jaxml[tpu]
        ...     assert dict(tpu_mesh("v5e", "context").shape) == {"context": 4}
    """
    return jax.sharding.Mesh(_tpus(chip), (axis_name,))


def _tpus(chip: str) -> list:
    """The chips of a small TPU, as libtpu describes it."""
    return topology.devices(TPU_TOPOLOGIES[chip])
