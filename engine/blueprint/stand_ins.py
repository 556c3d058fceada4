"""Stand-ins for torch: tensors that have a shape and no values, and the layers made of them.

What only shapes depend on is computed; everything else is `Anything`, which takes any use and means
nothing. A parameter whose shape came out of `Anything` has none, and `engine.blueprint.drawing`
then knows nothing of the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from math import prod
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

Shape = tuple[int, ...]


class Anything:
    """Stand for what does not matter: it can be called, read, entered and inherited from."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __call__(self, *given: Any, **named: Any) -> Any:
        """Return a class or function that is decorated as it is."""
        decorates = len(given) == 1 and not named and isinstance(given[0], (type, FunctionType))
        return given[0] if decorates else Anything()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything()

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        return ()

    def __getitem__(self, key: Any) -> Any:
        return Anything()

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def __contains__(self, key: Any) -> bool:
        return False

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __len__(self) -> int:
        return 0

    def __bool__(self) -> bool:
        return False

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: Any) -> None: ...

    def __or__(self, other: Any) -> Any:
        return Anything()

    __ror__ = __and__ = __rand__ = __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __or__
    __rmul__ = __truediv__ = __rtruediv__ = __floordiv__ = __mod__ = __pow__ = __rpow__ = __or__


class Stub(ModuleType):
    """A module whose every name is `Anything`, but for those that are given."""

    def __init__(self, name: str, **names: Any) -> None:
        super().__init__(name)
        vars(self).update(names)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything()


class Tensor:
    """Have a shape, or None where it is not known."""

    device = SimpleNamespace(type="meta")

    def __init__(self, shape: Shape | None = None, dtype: str | None = None) -> None:
        self.shape = shape
        self.dtype = dtype

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        shape = self.shape if name in ELEMENTWISE else None
        dtype = name if name in FORMATS else self.dtype
        return lambda *_, **__: Tensor(shape, dtype)

    def dim(self) -> int:
        """Return how many dimensions there are."""
        return len(self.shape or ())

    def size(self, dim: int | None = None) -> Any:
        """Return the shape, or one part of it."""
        return self.shape if dim is None or self.shape is None else self.shape[dim]

    def numel(self) -> int:
        """Return how many numbers there would be."""
        return prod(self.shape or ())

    def unsqueeze(self, dim: int) -> Tensor:
        """Add a dimension of one."""
        if self.shape is None:
            return Tensor()
        place = dim if dim >= 0 else len(self.shape) + 1 + dim
        return Tensor((*self.shape[:place], 1, *self.shape[place:]))

    def view(self, *sizes: Any) -> Tensor:
        """Arrange the same numbers anew."""
        wanted = _sizes(sizes)
        if -1 in wanted and self.shape is not None:
            rest = self.numel() // -prod(wanted)
            wanted = tuple(rest if size == -1 else size for size in wanted)
        return Tensor(wanted if self.shape is not None else None, self.dtype)

    reshape = view

    def expand(self, *sizes: Any) -> Tensor:
        """Repeat along dimensions of one."""
        if self.shape is None:
            return Tensor()
        wanted = _sizes(sizes)
        own = (1,) * (len(wanted) - len(self.shape)) + self.shape
        return Tensor(tuple(o if w == -1 else w for w, o in zip(wanted, own, strict=True)))

    def repeat(self, *sizes: Any) -> Tensor:
        """Put copies side by side."""
        if self.shape is None:
            return Tensor()
        times = _sizes(sizes)
        own = (1,) * (len(times) - len(self.shape)) + self.shape
        return Tensor(tuple(t * o for t, o in zip(times, own, strict=True)))

    def __getitem__(self, key: Any) -> Tensor:
        if self.shape is None:
            return Tensor()
        sizes: list[int] = []
        left = list(self.shape)
        for part in key if isinstance(key, tuple) else (key,):
            if part is None:
                sizes.append(1)
            elif part == slice(None):
                sizes.append(left.pop(0))
            elif isinstance(part, int):
                left.pop(0)
            else:
                return Tensor()
        return Tensor((*sizes, *left))

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def __len__(self) -> int:
        return self.shape[0] if self.shape else 0

    def __bool__(self) -> bool:
        return False

    def __add__(self, other: Any = None) -> Tensor:
        theirs = other.shape if isinstance(other, Tensor) else ()
        if self.shape is None or theirs is None or isinstance(other, Anything):
            return Tensor()
        rank = max(len(self.shape), len(theirs))
        pairs = zip(_widened(self.shape, rank), _widened(theirs, rank), strict=True)
        return Tensor(tuple(max(pair) for pair in pairs))

    __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __add__
    __pow__ = __rpow__ = __mod__ = __floordiv__ = __neg__ = __invert__ = __add__
    __lt__ = __gt__ = __le__ = __ge__ = __and__ = __or__ = __add__


ELEMENTWISE = frozenset({
    "abs", "add_", "bfloat16", "bool", "ceil", "clamp", "clone", "contiguous", "copy_", "cos",
    "cpu", "detach", "div_", "double", "erfinv_", "exp", "expm1", "fill_", "float", "floor",
    "half", "int", "log", "log2", "long", "masked_fill", "mul_", "neg", "normal_", "pow",
    "reciprocal", "requires_grad_", "round", "rsqrt", "sin", "softmax", "sqrt", "to", "tril",
    "triu", "trunc_", "type", "uniform_", "zero_",
})  # fmt: skip
"""Methods of a tensor that leave its shape as it is."""


def _widened(shape: Shape, rank: int) -> Shape:
    return (1,) * (rank - len(shape)) + shape


def _sizes(given: tuple[Any, ...]) -> Shape:
    if len(given) == 1 and isinstance(given[0], (tuple, list)):
        given = tuple(given[0])
    return tuple(int(size) for size in given)


def _made(*sizes: Any, size: Any = None, dtype: Any = None, **_: Any) -> Tensor:
    try:
        return Tensor(_sizes(sizes if size is None else (size,)), dtype)
    except (TypeError, ValueError):
        return Tensor()


def _arange(start: Any, end: Any = None, step: Any = 1, **_: Any) -> Tensor:
    start, end = (0, start) if end is None else (start, end)
    try:
        return Tensor((max(0, math.ceil((end - start) / step)),))
    except TypeError:
        return Tensor()


def _tensor(value: Any, **_: Any) -> Tensor:
    def shape(part: Any) -> Shape:
        if isinstance(part, Tensor):
            return part.shape or ()
        if isinstance(part, (list, tuple)):
            return (len(part), *(shape(part[0]) if part else ()))
        return ()

    return Tensor(shape(value))


def _like(tensor: Any = None, *_: Any, dtype: Any = None, **__: Any) -> Tensor:
    known = isinstance(tensor, Tensor)
    return Tensor(tensor.shape, dtype or tensor.dtype) if known else Tensor()


def _joined(tensors: Any, dim: int = 0, **_: Any) -> Tensor:
    shapes = [tensor.shape for tensor in tensors]
    if not shapes or None in shapes:
        return Tensor()
    sizes = list(shapes[0])
    sizes[dim] = sum(shape[dim] for shape in shapes)
    return Tensor(tuple(sizes))


def _stacked(tensors: Any, dim: int = 0, **_: Any) -> Tensor:
    return _joined([each.unsqueeze(dim) for each in tensors], dim)


class Parameter(Tensor):
    """A tensor that is trained: a weight."""

    def __init__(self, data: Any = None, requires_grad: bool = True) -> None:
        super().__init__(data.shape if isinstance(data, Tensor) else None)


class Buffer(Tensor):
    """A tensor that is not trained."""

    def __init__(self, data: Any = None, persistent: bool = True) -> None:
        known = isinstance(data, Tensor)
        super().__init__(*((data.shape, data.dtype) if known else ()))
        self.persistent = persistent


class Module:
    """Hold parameters and other modules, under the names of attributes."""

    training = False

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __call__(self, *_: Any, **__: Any) -> Any:
        """Compute nothing."""
        return Anything()

    def register_parameter(self, name: str, parameter: Any) -> None:
        """Keep a parameter."""
        setattr(self, name, parameter)

    def register_buffer(self, name: str, tensor: Any, persistent: bool = True) -> None:
        """Keep a tensor that is not trained."""
        kept = isinstance(tensor, Tensor)
        setattr(self, name, Buffer(tensor, persistent) if kept else tensor)

    def add_module(self, name: str, module: Any) -> None:
        """Keep a module."""
        setattr(self, name, module)

    register_module = add_module

    def get_submodule(self, name: str) -> Any:
        """Return a module by its path."""
        found: Any = self
        for part in name.split("."):
            found = getattr(found, part)
        return found

    def named_children(self) -> list[tuple[str, Module]]:
        """Return the modules right below this one."""
        return [(name, each) for name, each in vars(self).items() if isinstance(each, Module)]

    def named_modules(self, prefix: str = "", **_: Any) -> Iterator[tuple[str, Module]]:
        """Yield this module and all below it, by their paths."""
        yield prefix, self
        for name, child in self.named_children():
            yield from child.named_modules(f"{prefix}.{name}".lstrip("."))

    def named_tensors(self, prefix: str = "") -> Iterator[tuple[str, Parameter | Buffer]]:
        """Yield all parameters and buffers by their paths, in the order they were made."""
        for name, each in vars(self).items():
            path = f"{prefix}.{name}".lstrip(".")
            if isinstance(each, Parameter | Buffer):
                yield path, each
            elif isinstance(each, Module):
                yield from each.named_tensors(path)

    def named_parameters(self, prefix: str = "", **_: Any) -> Iterator[tuple[str, Parameter]]:
        """Yield all parameters by their paths."""
        for path, each in self.named_tensors(prefix):
            if isinstance(each, Parameter):
                yield path, each

    def children(self) -> list[Module]:
        """Return the modules right below this one."""
        return [child for _, child in self.named_children()]

    def modules(self) -> list[Module]:
        """Return this module and all below it."""
        return [module for _, module in self.named_modules()]

    def parameters(self, **_: Any) -> list[Parameter]:
        """Return all parameters."""
        return [parameter for _, parameter in self.named_parameters()]

    def state_dict(self) -> dict[str, Parameter]:
        """Return all parameters by their paths."""
        return dict(self.named_parameters())

    def to(self, *_: Any, **__: Any) -> Any:
        """Stay."""
        return self

    apply = eval = train = requires_grad_ = half = float = bfloat16 = to

    def register_forward_hook(self, *_: Any, **__: Any) -> None:
        """Ignore it: nothing is ever called."""

    register_forward_pre_hook = register_load_state_dict_pre_hook = register_forward_hook
    register_load_state_dict_post_hook = _register_load_state_dict_pre_hook = register_forward_hook


class Linear(Module):
    """Multiply by a matrix, `[out_features, in_features]`."""

    def __init__(self, in_features: int, out_features: int, bias: Any = True, **_: Any) -> None:
        self.in_features, self.out_features = in_features, out_features
        self.weight = Parameter(_made(out_features, in_features))
        self.bias = Parameter(_made(out_features)) if bias else None


class Bilinear(Module):
    """Multiply two inputs by a cube."""

    def __init__(self, first: int, second: int, out: int, bias: Any = True, **_: Any) -> None:
        self.weight = Parameter(_made(out, first, second))
        self.bias = Parameter(_made(out)) if bias else None


class Embedding(Module):
    """Look rows up."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: Any = None,
        *_: Any,
        **__: Any,
    ) -> None:
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = padding_idx
        self.weight = Parameter(_made(num_embeddings, embedding_dim))


class LayerNorm(Module):
    """Normalize over the last dimensions."""

    def __init__(
        self,
        normalized_shape: Any,
        eps: Any = 1e-5,
        elementwise_affine: Any = True,
        bias: Any = True,
        *_: Any,
        **__: Any,
    ) -> None:
        many = isinstance(normalized_shape, (tuple, list))
        self.normalized_shape = tuple(normalized_shape) if many else (normalized_shape,)
        self.eps = eps
        scaled = bool(elementwise_affine)
        self.weight = Parameter(_made(self.normalized_shape)) if scaled else None
        self.bias = Parameter(_made(self.normalized_shape)) if scaled and bias else None


class RMSNorm(LayerNorm):
    """Normalize by the root of the mean square."""

    def __init__(
        self, normalized_shape: Any, eps: Any = None, elementwise_affine: Any = True, **_: Any
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias=False)


class BatchNorm(Module):
    """Normalize over the batch; the running means are no parameters."""

    def __init__(
        self, num_features: int, eps: Any = 1e-5, momentum: Any = 0.1, affine: Any = True, **_: Any
    ) -> None:
        self.weight = Parameter(_made(num_features)) if affine else None
        self.bias = Parameter(_made(num_features)) if affine else None


class InstanceNorm(BatchNorm):
    """Normalize each example by itself."""

    def __init__(
        self, num_features: int, eps: Any = 1e-5, momentum: Any = 0.1, affine: Any = False, **_: Any
    ) -> None:
        super().__init__(num_features, affine=affine)


class GroupNorm(BatchNorm):
    """Normalize groups of channels."""

    def __init__(
        self, num_groups: int, num_channels: int, eps: Any = 1e-5, affine: Any = True, **_: Any
    ) -> None:
        super().__init__(num_channels, affine=affine)


class MultiheadAttention(Module):
    """Attend, with queries, keys and values of one size."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: Any = 0.0,
        bias: Any = True,
        *_: Any,
        **__: Any,
    ) -> None:
        self.in_proj_weight = Parameter(_made(3 * embed_dim, embed_dim))
        self.in_proj_bias = Parameter(_made(3 * embed_dim)) if bias else None
        self.out_proj = Linear(embed_dim, embed_dim, bias)


class PReLU(Module):
    """Scale what is below zero."""

    def __init__(self, num_parameters: int = 1, **_: Any) -> None:
        self.weight = Parameter(_made(num_parameters))


def _convolution(dims: int, *, transposed: bool) -> type[Module]:
    class Convolution(Module):
        def __init__(
            self,
            in_channels: int,
            out_channels: int,
            kernel_size: Any,
            stride: Any = 1,
            padding: Any = 0,
            *more: Any,
            **named: Any,
        ) -> None:
            order = ("output_padding", "groups", "bias", "dilation")
            named |= dict(zip(order if transposed else order[3:] + order[1:3], more, strict=False))
            self.in_channels, self.out_channels = in_channels, out_channels
            self.kernel_size, self.stride = _each(kernel_size, dims), _each(stride, dims)
            self.padding, self.dilation = padding, _each(named.get("dilation", 1), dims)
            self.groups = named.get("groups", 1)
            ends = (in_channels, out_channels) if transposed else (out_channels, in_channels)
            self.weight = Parameter(_made(ends[0], ends[1] // self.groups, *self.kernel_size))
            self.bias = Parameter(_made(out_channels)) if named.get("bias", True) else None

    return Convolution


def _each(size: Any, dims: int) -> tuple[Any, ...]:
    return tuple(size) if isinstance(size, (tuple, list)) else (size,) * dims


class ModuleList(Module):
    """Hold modules by number."""

    def __init__(self, modules: Iterable[Any] = ()) -> None:
        self.extend(modules)

    def append(self, module: Any) -> ModuleList:
        """Add one at the end."""
        setattr(self, str(len(self)), module)
        return self

    def extend(self, modules: Iterable[Any]) -> ModuleList:
        """Add several at the end."""
        for module in modules:
            self.append(module)
        return self

    def __iter__(self) -> Iterator[Any]:
        return iter([each for name, each in vars(self).items() if name.isdigit()])

    def __len__(self) -> int:
        return sum(name.isdigit() for name in vars(self))

    def __getitem__(self, index: Any) -> Any:
        return ModuleList(list(self)[index]) if isinstance(index, slice) else list(self)[index]

    def __setitem__(self, index: int, module: Any) -> None:
        setattr(self, str(index % len(self)), module)


class Sequential(ModuleList):
    """Call modules one after the other."""

    def __init__(self, *modules: Any) -> None:
        if len(modules) == 1 and isinstance(modules[0], dict):
            vars(self).update(modules[0])
        else:
            self.extend(modules)


class ModuleDict(Module):
    """Hold modules by name."""

    def __init__(self, modules: Any = None) -> None:
        vars(self).update(modules or {})

    def __setitem__(self, name: str, module: Any) -> None:
        setattr(self, name, module)

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)

    def __contains__(self, name: str) -> bool:
        return name in vars(self)

    def keys(self) -> list[str]:
        """Return the names."""
        return list(vars(self))

    def values(self) -> list[Any]:
        """Return the modules."""
        return list(vars(self).values())

    def items(self) -> list[tuple[str, Any]]:
        """Return the modules with their names."""
        return list(vars(self).items())

    def update(self, modules: Any) -> None:
        """Add several."""
        vars(self).update(modules)


WITHOUT_WEIGHTS = (
    "Identity", "Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "GELU", "ReLU", "ReLU6", "SiLU",
    "Sigmoid", "Tanh", "Softmax", "LeakyReLU", "ELU", "Softplus", "Hardtanh", "Hardswish", "Mish",
    "LogSoftmax", "GLU", "Flatten", "Unflatten", "Upsample", "PixelShuffle", "PixelUnshuffle",
    "MaxPool1d", "MaxPool2d", "AvgPool1d", "AvgPool2d", "AdaptiveAvgPool1d", "AdaptiveAvgPool2d",
    "AdaptiveMaxPool2d", "ZeroPad2d", "ConstantPad1d", "ReflectionPad1d", "ReflectionPad2d",
    "ReplicationPad1d", "CrossEntropyLoss", "MSELoss", "BCEWithLogitsLoss", "L1Loss", "NLLLoss",
    "SmoothL1Loss", "KLDivLoss", "CosineSimilarity", "Unfold", "Fold",
)  # fmt: skip


LIKE = (
    "abs", "clamp", "clone", "cos", "empty_like", "exp", "expm1", "flip", "full_like", "inverse",
    "log", "ones_like", "pow", "rand_like", "randn_like", "sigmoid", "sin", "softmax", "sqrt",
    "tanh", "tril", "triu", "zeros_like",
)  # fmt: skip
"""Functions of torch that leave a shape as it is."""

FORMATS = (
    "float64", "float32", "float16", "bfloat16", "int64", "int32", "int8", "uint8", "long", "int",
    "float", "half", "bool",
)  # fmt: skip


def _torch_nn() -> Stub:
    named: dict[str, Any] = {
        each.__name__: each
        for each in (
            Module, Linear, Bilinear, Embedding, LayerNorm, RMSNorm, GroupNorm, MultiheadAttention,
            PReLU, ModuleList, Sequential, ModuleDict, Parameter, Buffer,
        )
    }  # fmt: skip
    named |= {"ParameterList": ModuleList, "ParameterDict": ModuleDict}
    named |= {f"BatchNorm{dims}d": BatchNorm for dims in (1, 2, 3)}
    named |= {f"InstanceNorm{dims}d": InstanceNorm for dims in (1, 2, 3)}
    named |= {f"Conv{dims}d": _convolution(dims, transposed=False) for dims in (1, 2, 3)}
    named |= {f"ConvTranspose{dims}d": _convolution(dims, transposed=True) for dims in (1, 2, 3)}
    named |= {name: type(name, (Module,), {}) for name in WITHOUT_WEIGHTS}
    functional = Stub("torch.nn.functional", gelu=_like, silu=_like, relu=_like, softplus=_like)
    parameter = Stub("torch.nn.parameter", Parameter=Parameter)
    return Stub("torch.nn", functional=functional, parameter=parameter, **named)


def _torch() -> Stub:
    making: dict[str, Callable[..., Tensor]] = {
        **dict.fromkeys(("empty", "zeros", "ones", "rand", "randn"), _made),
        **dict.fromkeys(("FloatTensor", "LongTensor"), _made),
        **dict.fromkeys(("tensor", "as_tensor"), _tensor),
        **dict.fromkeys(("cat", "concat"), _joined),
        **dict.fromkeys(LIKE, _like),
        "arange": _arange,
        "eye": lambda rows, columns=None, **_: _made(rows, columns or rows),
        "full": lambda size, *_, **__: _made(size),
        "linspace": lambda start, end, steps, **_: _made(steps),
        "normal": lambda mean=0, std=1, size=None, **_: _made(size) if size else Tensor(),
        "outer": lambda one, other: Tensor((len(one), len(other))),
        "stack": lambda tensors, dim=0, **_: _joined(
            [each.unsqueeze(dim) for each in tensors], dim
        ),
    }
    return Stub(
        "torch",
        nn=_torch_nn(),
        Tensor=Tensor,
        Size=tuple,
        dtype=type("dtype", (), {}),
        __version__="2",
        **{name: name for name in FORMATS},
        **making,
    )


torch = _torch()
"""What `import torch` gives the code of a model."""
