"""Half precision on the CPU, by the rules that Paddle follows on a GPU.

Paddle's CPU kernels take no float16, and autocast leaves CPU tensors alone. So the same model code is run here on wider
numbers that stand for narrower ones:

| stored as | stands for |
|---|---|
| float32 | float16 or bfloat16: every value is on its grid |
| float64 | float32 |

Within `Simulation`, every operator that Python calls (paddle._C_ops and Tensor's arithmetic) goes through here:

- Under `autocast`, its inputs are cast as Paddle's C++ does it (fluid/eager/amp_utils.h): operators on the white list
  in half precision, on the black list in float32, all others in float32 if one of their inputs is. The lists are
  Paddle's own, paddle.amp.amp_lists, with what PaddleNLP's trainer adds. Without autocast, float32 wins (Paddle's type
  promotion), and an operator that refuses mixed inputs on a GPU refuses them here.
- A half result is rounded to the nearest number of the grid, ties to even, as a GPU does. (Paddle 2.6's own casts on
  the CPU cut off.) So is every gradient of a half tensor. Results beyond the grid, and results that become 0, are
  counted by operator in `overflows` and `underflows`.
- "float32", "float16" and "bfloat16" as literals in calls (`x.astype("float32")`, `paddle.zeros([1], "float32")`) mean
  what they stand for. A dtype that was read from a tensor is one already.
- `kept()` counts what autograd keeps for the backward, in the bytes that it would have.

Autocast itself is switched on in Paddle's tracer, which the model's `full_precision` regions and
`compat.autocast_dtype` read and write as on a GPU.

A simulated kernel computes in float32 and rounds once; sums in another order, and kernels that round more often, are
not simulated. Needs Paddle 2.6: 3.x binds operators such as matmul past paddle._C_ops. What 3.x changes in the rules is
data (`PADDLE_3_WHITE`, one rounding in linear, fused SwiGLU), so `Simulation(paddle_3=True)` runs 3.x's rules on 2.6.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from typing import Dict, Iterator, Set

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import _C_ops
from paddle.amp import amp_lists
from paddle.base import core, framework

from paddlemix.models.mgen_vl import attention, engine, language

HALF, FLOAT32 = paddle.float32, paddle.float64
Tensor = core.eager.Tensor
_to_tensor = paddle.to_tensor

# What amp_lists of Paddle 3 (3.3.1) has and 2.6.2 has not; the rest of the lists is the same.
PADDLE_3_WHITE = {"linear_v2", "flash_attn", "fused_rotary_position_embedding"}
PADDLE_3_BLACK_O1 = {"c_softmax_with_multi_label_cross_entropy"}

_LITERALS = {
    "float32": FLOAT32, "float16": HALF, "bfloat16": HALF, paddle.float16: HALF, paddle.bfloat16: HALF,
}  # fmt: skip
# Functions whose dtype may be a literal.
_CREATORS = ("full", "zeros", "ones", "arange", "cast", "to_tensor")
# Results that are copies of inputs are on the grid already, and their gradients are rounded one operator further.
_MOVES = {
    "assign", "concat", "flatten", "index_sample", "reshape", "set_value_", "set_value_with_tensor_", "slice", "split",
    "split_with_num", "squeeze", "stack", "strided_slice", "transpose", "unbind", "unsqueeze", "where",
}  # fmt: skip
_UNTOUCHED = {"adamw_", "check_numerics"}
_OPERATORS = {
    "__add__": "add", "__radd__": "add", "__sub__": "subtract", "__rsub__": "subtract", "__mul__": "multiply",
    "__rmul__": "multiply", "__truediv__": "divide", "__rtruediv__": "divide", "__div__": "divide",
    "__rdiv__": "divide", "__pow__": "elementwise_pow", "__matmul__": "matmul",
}  # fmt: skip


def nearest(array: np.ndarray, dtype: str) -> np.ndarray:
    """float32 → the nearest number of "float16" or "bfloat16", ties to even, kept as float32."""
    array = np.asarray(array, np.float32)
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return array.astype(np.float16).astype(np.float32)
    bits = np.ascontiguousarray(array).view(np.uint32)
    upper = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return np.where(np.isfinite(array), upper.view(np.float32), array)


def autocast_lists(dtype: str, level: str, paddle_3: bool = False, white=()):
    """(white, black), names as in paddle._C_ops, of the autocast that PaddleNLP's trainer opens.

    white: the key amp_custom_white_list.
    """
    allowed = set(amp_lists.white_list()[dtype][level]) | set(white)
    blocked = set(amp_lists.black_list()[dtype][level]) | {"reduce_sum", "c_softmax_with_cross_entropy"}
    if level == "O2":
        allowed |= {"lookup_table", "lookup_table_v2"}
    if paddle_3:
        allowed |= PADDLE_3_WHITE
    blocked -= allowed
    return tuple({core._get_phi_kernel_name(name) for name in names} | names for names in (allowed, blocked))


class Kept:
    """Bytes that autograd keeps for the backward, as half precision would have them.

    layers: by name of the module among those that were watched ("" outside of them). Parameters are not counted (their
    copies are), nor a tensor a second time.
    """

    _SIZES = {HALF: 2, FLOAT32: 4, paddle.int64: 8, paddle.int32: 4, paddle.uint8: 1, paddle.bool: 1}

    def __init__(self) -> None:
        self.layers: Counter = Counter()
        self.inside = [""]
        self._tensors: Dict[int, Tensor] = {}
        self.parameters: Set[int] = set()

    def pack(self, tensor):
        address = tensor.data_ptr()
        if address not in self.parameters and address not in self._tensors:
            # Held, so that no other tensor gets its address.
            self._tensors[address] = tensor
            self.layers[self.inside[-1]] += math.prod(tensor.shape) * self._SIZES[tensor.dtype]
        return tensor


class _FusedAttention(paddle.autograd.PyLayer):
    """What the kernel computes and keeps: q, k, v, mask, result, and the logarithms of the sums in float32."""

    @staticmethod
    def forward(ctx, query, key, value, mask):
        weights, sums = _FusedAttention.weights(query, key, mask)
        out = paddle.einsum("bhts,bshd->bthd", weights, value.astype(FLOAT32)).astype(HALF)
        ctx.save_for_backward(query, key, value, out, sums, *([] if mask is None else [mask]))
        return out

    @staticmethod
    def weights(query, key, mask):
        query, key = query.astype(FLOAT32), key.astype(FLOAT32)
        scores = paddle.einsum("bthd,bshd->bhts", query, key) / math.sqrt(query.shape[-1])
        if mask is not None:
            scores = scores + mask.astype(FLOAT32)
        return F.softmax(scores), paddle.logsumexp(scores, axis=-1)

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, out, _, *masks = ctx.saved_tensor()
        mask = masks[0] if masks else None
        weights, _ = _FusedAttention.weights(query, key, mask)
        gradient, out = gradient.astype(FLOAT32), out.astype(FLOAT32)
        for_value = paddle.einsum("bhts,bthd->bshd", weights, gradient)
        for_weights = paddle.einsum("bthd,bshd->bhts", gradient, value.astype(FLOAT32))
        inner = (gradient * out).sum(-1).transpose([0, 2, 1]).unsqueeze(-1)
        for_scores = weights * (for_weights - inner) / math.sqrt(query.shape[-1])
        for_query = paddle.einsum("bhts,bshd->bthd", for_scores, key.astype(FLOAT32))
        for_key = paddle.einsum("bhts,bthd->bshd", for_scores, query.astype(FLOAT32))
        gradients = [for_query.astype(HALF), for_key.astype(HALF), for_value.astype(HALF)]
        return tuple(gradients if mask is None or mask.stop_gradient else gradients + [None])


class _FusedSwiGLU(paddle.autograd.PyLayer):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx, gradient):
        gate, up, gradient = (tensor.astype(FLOAT32) for tensor in (*ctx.saved_tensor(), gradient))
        sigmoid = F.sigmoid(gate)
        for_gate = gradient * up * sigmoid * (1 + gate * (1 - sigmoid))
        return for_gate.astype(HALF), (gradient * gate * sigmoid).astype(HALF)


class Simulation:
    """A context in which operators compute in half precision.

    dtype: "float16" or "bfloat16". paddle_3: by Paddle 3's rules instead of 2.6's. overflows, underflows: counts by
    operator, gradients as "gradient of …".
    """

    def __init__(self, dtype: str, paddle_3: bool = False) -> None:
        self.dtype, self.paddle_3 = dtype, paddle_3
        self.overflows: Counter = Counter()
        self.underflows: Counter = Counter()
        # Storage dtypes of (query, key, value, mask or None) of each fused call.
        self.fused: list = []
        self._white: Set[str] = set()
        self._black: Set[str] = set()
        self._busy = False
        self._originals: list = []

    # ---- rounding

    def rounded(self, tensor, what: str):
        """`tensor`, a half one, on the grid."""
        array = tensor.numpy()
        result = nearest(array, self.dtype)
        finite = np.isfinite(result)
        if not finite.all():
            self._count(self.overflows, what, ~finite & np.isfinite(array))
        self._count(self.underflows, what, (result == 0) & (array != 0))
        return _to_tensor(result, place=paddle.CPUPlace())

    @staticmethod
    def _count(counter, what, found):
        count = int(found.sum())
        if count:
            counter[what] += count

    def _finish(self, name, result):
        """Round what an operator returned, and its gradient when it comes."""
        if name in _MOVES:
            return result
        outputs = result if isinstance(result, (list, tuple)) else [result]
        if name == "layer_norm":  # mean and variance are float32
            outputs = outputs[:1] if isinstance(result, (list, tuple)) else outputs
        for tensor in outputs:
            if not isinstance(tensor, Tensor) or tensor.dtype != HALF or not tensor._is_initialized():
                continue
            rounded = self.rounded(tensor, name)  # a name keeps it alive until its memory is shared
            tensor.get_tensor()._share_data_with(rounded.get_tensor())
            if not tensor.stop_gradient and not tensor.is_leaf:
                tensor.register_hook(
                    lambda gradient: self.rounded(gradient, f"gradient of {name}")
                    if gradient.dtype == HALF
                    else gradient
                )
        return result

    # ---- Paddle's casting

    def _wanted(self, name: str, tensors) -> paddle.dtype:
        if name in self._white:
            return HALF
        if name in self._black:
            return FLOAT32
        if name == "layer_norm":  # its first input alone is asked
            tensors = tensors[:1]
        return FLOAT32 if any(tensor.dtype == FLOAT32 for tensor in tensors) else HALF

    def _cast(self, name, arguments):
        """The arguments of an operator, as autocast hands them on."""
        tracer = framework._dygraph_tracer()
        if tracer._amp_level == core.AmpLevel.O0:
            return list(arguments)
        name = name.rstrip("_")
        lists = [list(a) if isinstance(a, (list, tuple)) else [a] for a in arguments]
        floats = [t for one in lists for t in one if isinstance(t, Tensor) and t.dtype in (HALF, FLOAT32)]
        if not floats:
            return list(arguments)
        wanted = self._wanted(name, floats)

        def changed(tensor):
            if not isinstance(tensor, Tensor) or tensor.dtype not in (HALF, FLOAT32) or tensor.dtype == wanted:
                return tensor
            # Weight and bias of a float16 layer_norm stay as they are.
            if name == "layer_norm" and self.dtype == "float16" and tensor is not floats[0]:
                return tensor
            return _C_ops.cast(tensor, wanted)

        return [
            type(a)(changed(t) for t in a) if isinstance(a, (list, tuple)) else changed(a) for a in arguments
        ]

    def _run(self, name, function, arguments, options=None):
        self._busy = True
        try:
            return self._finish(name, function(*arguments, **(options or {})))
        finally:
            self._busy = False

    def _operator(self, name, function):
        def run(*arguments, **options):
            if self._busy:
                return function(*arguments, **options)
            if name != "cast":
                arguments = self._cast(name, arguments)
            return self._run(name, function, arguments, options)

        return run

    def _linear(self, original):
        """Paddle 2.6: a product and a sum, each cast by itself. 3.x: one operator on the white list."""

        def run(x, weight, bias=None):
            if self._busy:
                return original(x, weight, bias)
            if self.paddle_3:
                return self._run("linear", original, self._cast("linear_v2", [x, weight, bias]))
            product = _C_ops.matmul(x, weight, False, False)
            return product if bias is None else _C_ops.add(product, bias)

        return run

    def _arithmetic(self, method, original):
        """Tensor's operators, which C++ binds past paddle._C_ops."""
        name = _OPERATORS[method]

        def run(left, right):
            if self._busy:
                return original(left, right)
            if not isinstance(right, Tensor):
                # By a number: scale or pow.
                left = self._cast("pow" if "pow" in method else "scale", [left])[0]
                return self._run(name, original, [left, right])
            if method.startswith("__r"):
                left, right = right, left
            if name == "matmul":
                return _C_ops.matmul(left, right, False, False)
            return getattr(_C_ops, name)(left, right)

        return run

    @staticmethod
    def _literal(function):
        def run(*arguments, **options):
            def meant(value):
                if isinstance(value, (str, paddle.dtype)):
                    return _LITERALS.get(value, value)
                if isinstance(value, (np.ndarray, np.floating)) and value.dtype == np.float32:
                    return value.astype(np.float64)
                return value

            return function(*map(meant, arguments), **{key: meant(value) for key, value in options.items()})

        return run

    def _named(self, original):
        """Let the model ask for the half dtype by name."""

        def compute_dtype(tensor):
            dtype = original(tensor)
            return getattr(paddle, self.dtype) if dtype == HALF else dtype

        return compute_dtype

    def _attention(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, training=True):
        inputs = [t for t in (query, key, value, attn_mask) if t is not None]
        self.fused.append(tuple(tensor.dtype for tensor in inputs))
        inputs = self._cast("flash_attn", inputs)
        if any(tensor.dtype != HALF for tensor in inputs):
            raise NotImplementedError("flash_attn has kernels for float16 and bfloat16 alone")
        mask = inputs[3] if len(inputs) > 3 else None
        return self._run("flash_attn", _FusedAttention.apply, [*inputs[:3], mask])

    # ---- contexts

    def _replace(self, owner, name, made):
        self._originals.append((owner, name, getattr(owner, name)))
        setattr(owner, name, made)

    def __enter__(self) -> Simulation:
        for name in dir(_C_ops):
            function = getattr(_C_ops, name)
            # Gradients' operators are called by C++ alone, from within the backward.
            if callable(function) and not name.startswith("_") and not name.endswith("_grad"):
                if name not in _UNTOUCHED:
                    made = self._linear(function) if name == "linear" else self._operator(name, function)
                    self._replace(_C_ops, name, made)
        for method in _OPERATORS:
            self._replace(Tensor, method, self._arithmetic(method, getattr(Tensor, method)))
        for owner, names in ((paddle, _CREATORS), (Tensor, ("astype", "cast"))):
            for name in names:
                self._replace(owner, name, self._literal(getattr(owner, name)))
        self._replace(F, "scaled_dot_product_attention", self._attention)
        language.frequencies.cache_clear()  # they have the dtype that was asked for first
        for module in (attention, language):
            self._replace(module, "widened", lambda tensor: tensor.astype("float32"))
        for module in (attention, engine, language):
            # Operands are spread out for the CPU's kernels alone.
            self._replace(module, "spread", lambda tensor, shape: tensor)
            self._replace(module, "compute_dtype", self._named(module.compute_dtype))
        if self.paddle_3:
            swiglu = self._operator("swiglu", _FusedSwiGLU.apply)
            self._replace(language, "swiglu", swiglu)
        return self

    def __exit__(self, *error) -> None:
        for owner, name, original in reversed(self._originals):
            setattr(owner, name, original)
        self._originals.clear()
        language.frequencies.cache_clear()

    @contextlib.contextmanager
    def autocast(self, level: str, white=()) -> Iterator[None]:
        """PaddleNLP's autocast at "O1" or "O2"; white: the key amp_custom_white_list."""
        tracer = framework._dygraph_tracer()
        self._white, self._black = autocast_lists(self.dtype, level, self.paddle_3, white)
        tracer._amp_level, tracer._amp_dtype = getattr(core.AmpLevel, level), self.dtype
        try:
            yield
        finally:
            tracer._amp_level, tracer._amp_dtype = core.AmpLevel.O0, "float32"

    @contextlib.contextmanager
    def kept(self, model, watched=()) -> Iterator[Kept]:
        """Count what the forward within keeps. watched: (name, layer) pairs; of nested ones the inner counts."""
        found = Kept()
        found.parameters = {parameter.data_ptr() for parameter in model.parameters()}
        hooks = []
        for name, layer in watched:
            hooks.append(layer.register_forward_pre_hook(lambda *_, name=name: found.inside.append(name)))
            hooks.append(layer.register_forward_post_hook(lambda *_: found.inside.pop() and None))
        try:
            with paddle.autograd.saved_tensors_hooks(found.pack, lambda tensor: tensor):
                yield found
        finally:
            for hook in hooks:
                hook.remove()

    # ---- a model

    def decorate(self, model, level: str) -> None:
        """paddle.amp.decorate: at O2 the model's weights become half, at O1 they stay float32.

        At O2, buffers become bfloat16 too, and stay float32 beside float16.
        """
        if level == "O1":
            model.to(dtype="float64")
            return
        for parameter in model.parameters():
            parameter.set_value(nearest(parameter.numpy(), self.dtype))
        for layer in model.sublayers(include_self=True):
            for name, buffer in layer._buffers.items():
                if self.dtype == "bfloat16":
                    buffer.set_value(nearest(buffer.numpy(), self.dtype))
                else:
                    layer._buffers[name] = buffer.astype(FLOAT32)
