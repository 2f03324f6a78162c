"""What tests of the CUDA quantizer run in a process of their own: triton is imported with its
interpreter on or off, once and for all.
"""

import os
import pickle
import sys
from typing import Any

import torch


def start(interpret: bool, cache: str) -> None:
    """First call in the process."""
    assert "triton" not in sys.modules, "TRITON_INTERPRET is read when triton is imported"
    os.environ["TRITON_INTERPRET"] = "1" if interpret else "0"
    os.environ["TRITON_CACHE_DIR"] = cache  # kernels are compiled, not found
    torch.set_num_threads(1)


def call(pickled: bytes) -> bytes:
    """`name(*args, **options)` of this module, as bytes: a process pool would send tensors through
    shared memory.
    """
    name, args, options = pickle.loads(pickled)
    return pickle.dumps(globals()[name](*args, **options))


def quantize(
    x,
    layout,
    recipe,
    *,
    want_values=True,
    dequantized=torch.float32,
    tile_elements=None,
    wide=False,
) -> dict[str, Any] | None:
    """quantize_cuda's results by name, and what dequantize_cuda makes of them in the type
    `dequantized`.
    """
    from dynasty_lightning.numerics.backends import triton as triton_quantizer
    from dynasty_lightning.numerics.backends import triton_tiles

    kept = triton_tiles.TILE_ELEMENTS, triton_quantizer.needs_wide_offsets
    try:
        triton_tiles.TILE_ELEMENTS = tile_elements or kept[0]
        triton_quantizer.needs_wide_offsets = (lambda _: True) if wide else kept[1]
        blocks = triton_quantizer.quantize_cuda(x, layout, recipe, want_values=want_values)
        if blocks is None:
            return None
        fields = {
            "codes": blocks.codes,
            "relative_exponents": blocks.relative_exponents,
            "headers": blocks.headers,
            "largest_exponents": blocks.largest_exponents,
        }
        if blocks.bfloat16 is not None:
            fields["values"] = blocks.bfloat16
        if blocks.largest_exponents.numel() == 1:
            fields["dequantized"] = triton_quantizer.dequantize_cuda(blocks, dequantized)
        return fields
    finally:
        triton_tiles.TILE_ELEMENTS, triton_quantizer.needs_wide_offsets = kept


def numbers(
    stream, code: int, count: int, *, share: int, wide: bool, device: str = "cpu"
) -> torch.Tensor:
    """The first `count` numbers of the stream, `share` to a counter."""
    from dynasty_lightning.numerics.backends.triton import _stream_words

    from . import triton_stream

    groups = 1 << (-(-count // share) - 1).bit_length()
    out = torch.empty(groups * share, dtype=torch.int32, device=device)
    triton_stream.numbers_kernel[(1,)](
        out, stream=_stream_words(stream, code), GROUPS=groups, SHARE=share, WIDE=wide
    )
    return out[:count].cpu()


def philox(counter, key, *, device: str = "cpu") -> list[int]:
    from . import triton_stream

    words = torch.tensor([*counter, *key], dtype=torch.int64, device=device)
    out = torch.empty(4, dtype=torch.int64, device=device)
    triton_stream.philox_kernel[(1,)](words, out)
    return out.tolist()


def compiled(x, layout, recipe, capability: int) -> dict[str, str]:
    """PTX of each kernel that the call would launch, compiled without a GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dynasty_lightning.numerics.backends import triton as triton_quantizer

    pointers = {
        torch.int32: "*i32",
        torch.int8: "*i8",
        torch.uint8: "*u8",
        torch.int16: "*i16",
        torch.float16: "*fp16",
    }
    texts: dict[str, str] = {}

    def kind_of(value, varies, path, constants, attributes):
        """Type of an argument, or types of a tuple; a 1 becomes a constant, as at a call."""
        if isinstance(value, tuple):
            inner = enumerate(value)
            return tuple(kind_of(v, varies, (*path, i), constants, attributes) for i, v in inner)
        if isinstance(value, torch.Tensor):
            attributes[path] = [["tt.divisibility", 16]]
            return pointers[value.dtype]
        if value == 1 and not varies:
            constants[path] = value
            return "constexpr"
        if value % 16 == 0 and not varies:
            attributes[path] = [["tt.divisibility", 16]]
        return "i32"

    def launch(kernel, programs, warps, **arguments):
        signature, constants, attributes = {}, {}, {}
        for i, parameter in enumerate(kernel.params):
            value = arguments[parameter.name]
            if parameter.is_constexpr:
                signature[parameter.name], constants[(i,)] = "constexpr", value
            else:
                signature[parameter.name] = kind_of(
                    value, parameter.do_not_specialize, (i,), constants, attributes
                )
        source = ASTSource(kernel, signature, constants, attributes)
        binary = triton.compile(
            source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps}
        )
        texts[kernel.fn.__name__] = binary.asm["ptx"]

    kept = triton_quantizer._launch
    try:
        triton_quantizer._launch = launch
        blocks = triton_quantizer.quantize_cuda(x, layout, recipe, want_values=True)
        triton_quantizer.dequantize_cuda(blocks, torch.bfloat16)
    finally:
        triton_quantizer._launch = kept
    return texts
