"""What every adapter method is made of: hyperparameters, an adapter at a site, and the anchor call."""

from __future__ import annotations

import dataclasses
import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import fx, nn

from adaptc.errors import PlanError
from adaptc.ir.dialect import DialectOp
from adaptc.ir.edit import Edit
from adaptc.ir.sites import mark_anchor
from adaptc.methods import affine, quantised
from adaptc.methods.quantised import Refusal
from adaptc.methods.rows import Groups, Rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """Hyperparameters of an adapter method; holds no tensors, compares by value, serialises to a dict.

    ``targets``, ``exclude`` and ``layers`` are a shorthand for the match of a one-rule plan;
    ``adaptc.Plan`` moves them into the rule's match, so a method inside a plan has them unset.
    """

    kind: ClassVar[str]
    #: PEFT's name of the method in ``adapter_config.json``, or None when PEFT has no such method.
    peft_kind: ClassVar[str | None] = None
    #: What the method can do; see ``adaptc.methods.Capabilities``.
    mergeable: ClassVar[bool] = False
    batchable: ClassVar[bool] = False
    #: True when adapters of it at linear layers can be in a bank: they change the output, or the input, of a call.
    bankable: ClassVar[bool] = False
    #: True when some of its adapters change the input of a module.
    changes_input: ClassVar[bool] = False
    sparse: ClassVar[bool] = False
    quantised: ClassVar[bool] = False
    #: True when the method acts on a model as a whole: a plan names no modules for it.
    on_model: ClassVar[bool] = False
    #: True when what is done to an embedding is done to every module whose weight is tied to it.
    follows_ties: ClassVar[bool] = False
    #: Options that the model itself answers where they are None: adapters may differ in what they say of it.
    of_model: ClassVar[tuple[str, ...]] = ()

    targets: tuple[str, ...] | str | None = None
    exclude: tuple[str, ...] | str | None = None
    layers: tuple[int, ...] | str | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list | set):  # methods are keys of dicts
                object.__setattr__(self, field.name, tuple(value))

    def require(self, name: str, ok: bool, expected: str, found: object = None) -> None:
        """Raise PlanError unless the option ``name`` is legal; ``found``: what to show instead of its value."""
        if not ok:
            value = getattr(self, name) if found is None else found
            raise PlanError(f"{type(self).__name__}: {name} is not legal", expected=expected, found=repr(value))

    def options(self) -> dict[str, Any]:
        """The method's own options that differ from their defaults, as plain data, in field order."""
        shorthand = {f.name for f in dataclasses.fields(Method)}
        chosen = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            default = field.default_factory() if callable(field.default_factory) else field.default
            if field.name not in shorthand and value != default:
                chosen[field.name] = dict(value) if isinstance(value, Mapping) else value
        return chosen

    @property
    def rank(self) -> int:
        """The largest inner dimension of its products; 0 where it has none."""
        return int(getattr(self, "r", 0))

    def at(self, path: str) -> Method:
        """The method as it applies at the site ``path`` (per-site patterns resolved)."""
        return self

    def patterns(self) -> Mapping[str, Mapping[str, Any]]:
        """The options that :meth:`at` resolves: name -> expressions on paths (``methods.patterns``) and values."""
        return {}

    def why_not(self, path: str, module: nn.Module) -> str | None:
        """Why this method cannot adapt ``module`` as it is stored, or None when it can: a quantised base, then
        :meth:`refusal`. This is what plans ask."""
        by_base = self.base_refusal(module)
        return self.refusal(path, module) if by_base is None else by_base.reason

    def base_refusal(self, module: nn.Module) -> Refusal | None:
        """Why this method cannot act on ``module`` because of how its base is quantised, or None."""
        return quantised.refusal(module, self.reads_weight(), inside=not self.quantised)

    def reads_weight(self) -> str | None:
        """What of this method needs the values of the frozen weight, in words of a plan; None when nothing does and it
        works on codes and scales as well."""
        return None if self.quantised else self.kind

    def refusal(self, path: str, module: nn.Module) -> str | None:
        """Why this method cannot adapt ``module``, or None when it can."""
        raise NotImplementedError(f"{type(self).__name__}.refusal")

    def place(self, model: nn.Module) -> str:
        """Path of the module whose call is changed (only where ``on_model``); "" for the model itself."""
        raise NotImplementedError(f"{type(self).__name__}.place")

    def build(self, path: str, module: nn.Module, *, dtype: torch.dtype | None, site_id: int) -> Adapter:
        """A freshly initialised adapter for ``module``, on its device; ``dtype`` None means the default."""
        raise NotImplementedError(f"{type(self).__name__}.build")

    def parameter_refusal(self, path: str, module: nn.Module, name: str) -> str | None:
        """Why this method cannot adapt the parameter ``name`` of ``module``, or None when it can; ``path``: its own."""
        return f"{self.kind} adapts modules, not parameters"

    def build_parameter(
        self, path: str, module: nn.Module, name: str, *, dtype: torch.dtype | None, site_id: int
    ) -> Adapter:
        """As :meth:`build`, for the parameter ``name`` of ``module``; the adapter has ``parameter`` set."""
        raise NotImplementedError(f"{type(self).__name__}.build_parameter")

    @property
    def needs_covariance(self) -> bool:
        """Whether fresh adapters are given the covariance of their module's inputs (``Adapter.set_covariance``)."""
        return False

    @classmethod
    def link(cls, adapters: Sequence[Adapter]) -> None:
        """Called once with all sites' fresh adapters of this class, in model order, before they are attached: where
        sites share tensors, here they get them."""


class Tapped(threading.local):
    """What a tap holds between the module that it reads and the module that it acts on: one value per thread."""

    value: torch.Tensor | None = None

    def __reduce__(self) -> tuple[type[Tapped], tuple[()]]:
        return Tapped, ()  # copies of a model start without a value


class AdapterDropout(nn.Dropout):
    """Says an adapter's dropout to whoever looks for ``nn.Dropout`` among a model's modules and sets ``p``, as TRL's
    ``disable_dropout_in_model`` does. It is never called: the adapter draws inside its own op."""

    adapter: Adapter

    def __init__(self, adapter: Adapter, p: float) -> None:
        self.__dict__["adapter"] = adapter  # no child, which would make a circle of modules
        super().__init__(p)

    @property
    def p(self) -> float:
        return float(self.adapter._dropout)

    @p.setter
    def p(self, value: float) -> None:
        self.adapter._dropout = repr(float(value))


class Adapter(nn.Module):
    """The tensors of one method at one site; lives at ``<site>.adapters.<name>``, one for a parameter of the module at
    ``<site>.adapters.<name>~<parameter>``.

    ``site_id`` (int64, shape (1,)) says at run time which site a graph works for: graphs are shared between equal
    layers, so a Python constant in the graph would not do.
    """

    site_id: torch.Tensor
    #: True when the adapter replaces the module's forward instead of correcting its output.
    replaces_forward: ClassVar[bool] = False
    #: True when ``apply_to`` takes outputs other than tensors.
    takes_any_output: ClassVar[bool] = False
    #: True when the adapter changes the module's input.
    acts_before: ClassVar[bool] = False
    #: True when the adapter acts on what the module's forward reads or computes on the way.
    acts_inside: ClassVar[bool] = False
    #: True when ``run_rows`` rounds the base otherwise than the module's own forward does: then it computes every row
    #: of a batch, those without an adapter too.
    rounds_base: ClassVar[bool] = False
    #: True when the adapter changes the arguments of its tap, and does not read them.
    changes_tapped: ClassVar[bool] = False
    #: Why no adapter of another kind can be merged beside this one; None for affine maps of a linear layer's input.
    merges_alone: ClassVar[str | None] = None
    #: The probability of dropout, as text (see ``set_dropout``).
    _dropout: str
    #: The module's own parameter that the adapter is for; None: the module.
    parameter: str | None = None
    #: Name of another module, whose input ``apply_to`` gets in the place of the site's own: two taps far apart. It is
    #: looked up below the site, then below what encloses it, outwards, and must run before the site's output is there.
    tap: str | None = None

    def __init__(self, method: Method, site_id: int) -> None:
        super().__init__()
        self.method = method
        self._site_id = site_id
        self.tapped = Tapped()
        self.register_buffer("site_id", torch.tensor([site_id], dtype=torch.int64), persistent=False)

    def set_dropout(self, p: float) -> None:
        """Keep the probability as ``self._dropout``, and as a module that others find where it is not zero."""
        # As text: of a float that differs between adapters Dynamo makes a graph input, finds that its value is
        # needed after all, and compiles a second time.
        self._dropout = repr(float(p))
        if p > 0:
            self.dropout = AdapterDropout(self, p)

    def replace(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output, computed in its place (only where ``replaces_forward``)."""
        raise NotImplementedError(f"{type(self).__name__}.replace")

    def apply_to(self, module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The site's corrected output, from the frozen ``module``, its input ``x`` and its output ``y``."""
        raise NotImplementedError(f"{type(self).__name__}.apply_to")

    @torch.no_grad()
    def correct(self, module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
        """Write into ``y`` what :meth:`apply_to` returns; asked outside of graphs, without gradients (in a bank)."""
        y.copy_(self.apply_to(module, x, y))

    def apply_before(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """The input that the frozen ``module`` gets in the place of ``x`` (only where ``acts_before``)."""
        raise NotImplementedError(f"{type(self).__name__}.apply_before")

    def run_inside(self, module: nn.Module, adapters: Sequence[Adapter], *args: Any, **kwargs: Any) -> Any:
        """The module's output with ``adapters`` (all of this class, this one the first) at work in its forward.

        Only where ``acts_inside``.
        """
        raise NotImplementedError(f"{type(self).__name__}.run_inside")

    @classmethod
    def check_together(cls, path: str, adapters: Sequence[Adapter]) -> None:
        """Raise SiteError where ``adapters`` (of this class, at the module ``path``) cannot act together."""

    def rows_refusal(self, module: nn.Module, *, spans: bool) -> Refusal | None:
        """Why rows of one batch (``spans``: tokens of its rows) cannot use different adapters, this one among them;
        None where they can.

        As it is here, of a ``batchable`` method: ``apply_to`` and ``apply_before`` compute each row of what they return
        from that row of what they are given (of dim 0; for spans of dims 0 and 1) and from nothing of the others, and
        have finite gradients where a row is zero.
        """
        if not self.method.batchable:
            return Refusal(f"{self.method.kind} does not say that it acts on rows apart from each other")
        if self.acts_inside or self.replaces_forward:
            return Refusal(f"{self.method.kind} acts inside of the module, and does not say how on rows apart")
        return None

    @classmethod
    def check_rows_together(cls, path: str, groups: Groups) -> None:
        """Raise BatchError where rows with these adapters cannot be in one batch; only asked where ``acts_inside``.

        ``groups``: for every adapter of the batch what it has at the module ``path`` (of several kinds), and nothing
        for the base where it has rows.
        """

    def together(self) -> object:
        """Equal, and not None, for adapters of one module that act on the rows of a batch in one op, ``apply_rows``."""
        return None

    def apply_rows(
        self, module: nn.Module, adapters: Sequence[Adapter], numbers: Sequence[int], rows: Rows, x: torch.Tensor,
        y: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """As :meth:`apply_to`, for the rows that have the ``adapters`` (this one the first), which have these
        ``numbers`` in the batch; other rows are as they were (only where ``together`` is not None)."""
        raise NotImplementedError(f"{type(self).__name__}.apply_rows")

    def run_rows(self, module: nn.Module, groups: Groups, rows: Rows, *args: Any, **kwargs: Any) -> Any:
        """The module's output where each row has the adapters of its group (of which this is the first that there is)
        at work in the forward, or in its place. Overridden, all of them are of this class.

        As it is here: the module's own forward, and then that of every group, of which its rows are kept.
        """
        output = type(module).forward(module, *args, **kwargs)
        for number, adapters in enumerate(groups):
            if len(adapters) == 0:
                continue
            own = rows.inputs(number, dict(enumerate(args))).values()
            named = rows.inputs(number, kwargs)
            first = adapters[0]
            if first.replaces_forward:
                changed = first.replace(*own, **named)
            else:
                changed = first.run_inside(module, adapters, *own, **named)
            output = rows.put(number, changed, output)
        return output

    def change_tapped(self, kwargs: dict[str, Any], live: Sequence[Adapter]) -> dict[str, Any]:
        """The keyword arguments that the tap's module gets in the place of ``kwargs`` (only where
        ``changes_tapped``); ``kwargs`` itself where nothing changes. ``live``: what acts at the site, this one too."""
        raise NotImplementedError(f"{type(self).__name__}.change_tapped")

    def set_covariance(self, path: str, weight: torch.Tensor, covariance: torch.Tensor) -> None:
        """Take initial values from the covariance (K, K) of the module's inputs (only where ``needs_covariance``)."""
        raise NotImplementedError(f"{type(self).__name__}.set_covariance")

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Called after each optimizer step where the user asked for it (``model.adaptc.on_step``)."""

    def merge_refusal(self, module: nn.Module, beside: Sequence[Adapter] = ()) -> Refusal | None:
        """Why the module's own tensors cannot take up what this adapter and then ``beside`` do, or None when they can.

        As it is here, where the method is ``mergeable``: all of them are affine in the input of a linear layer.
        """
        if not self.method.mergeable:
            return Refusal(f"{self.method.kind} cannot be folded into a weight")
        return affine.refusal(module, (self, *beside))

    def merged(self, module: nn.Module, beside: Sequence[Adapter] = ()) -> Mapping[str, torch.Tensor]:
        """Path of a tensor below ``module`` -> what replaces it so that the module alone computes in eval mode what it
        does with this adapter and then ``beside``: computed in fp64 and rounded once to the tensor's dtype.

        Nothing is changed. Only where ``merge_refusal`` is None.
        """
        return affine.merged(module, (self, *beside))

    def replaced(self, module: nn.Module, beside: Sequence[Adapter] = ()) -> Sequence[str]:
        """The paths of the tensors that :meth:`merged` replaces; nothing is computed."""
        return affine.replaced(module)

    @property
    def adds(self) -> bool:
        """Whether the adapter adds to the output (or the weights) what does not depend on the adapters that act before
        or after it, in whatever order."""
        return False

    def weight_update(self) -> torch.Tensor | None:
        """What the adapter adds to the (N, K) weight of a linear layer, in fp64, where that is its correction of
        the weight whatever else acts; None: :meth:`merged` reads the weight off the map."""
        return None

    def merge_key(self) -> object:
        """Of adapters of modules that share a weight: with equal keys they give it the same values."""
        return id(self)

    def products(self) -> Sequence[tuple[str, ...]]:
        """Names of parameters that multiply each other: where all but one of a group are zero, its gradient is zero.

        A name that the adapter does not have as a parameter is passed over.
        """
        return ()

    def peft_tensors(self) -> Mapping[str, torch.Tensor]:
        """Key suffix in adapter files (after the module path) -> the tensor stored there, in the file's shape.

        A tensor is a parameter or buffer, or a view of one: loading writes into it. PEFT's suffixes where PEFT has
        the method; else every parameter and persistent buffer by its own name.
        """
        return dict(self.state_dict(keep_vars=True))

    def set_peft_tensors(self, values: Mapping[str, torch.Tensor]) -> None:
        """Take over the values of a file, which have the suffixes and shapes of ``peft_tensors``."""
        for suffix, tensor in self.peft_tensors().items():
            tensor.data.copy_(values[suffix])

    def peft_difference(self) -> str | None:
        """What PEFT computes from the tensors of a file where that is another function, in words; None where it is the
        same one."""
        return None

    def method_now(self) -> Method:
        """The method as it acts now: a scale can be changed by hand."""
        return self.method

    def signature(self) -> tuple[object, ...]:
        """What a captured graph depends on: adapters of equal signatures share a graph."""
        tensors = tuple((n, tuple(p.shape), p.dtype, p.requires_grad) for n, p in self.named_parameters())
        return (self.method.kind, tensors)


@dataclasses.dataclass(frozen=True)
class Anchor:
    """How a method's anchor call is rewritten.

    ``function``: the module-level ``allow_in_graph`` function that hooks call; its body is the reference.
    ``expand``: ``(edit, **arguments of the call by name) -> node of the value that the call returns``.
    """

    function: Callable[..., torch.Tensor]
    expand: Callable[..., fx.Node]

    def __post_init__(self) -> None:
        mark_anchor(self.function)

    def bind(self, node: fx.Node) -> dict[str, Any]:
        """The arguments of an anchor node by the names of the function's parameters."""
        bound = inspect.signature(self.function).bind(*node.args, **node.kwargs)
        bound.apply_defaults()
        return dict(bound.arguments)


def anchor_of(op: DialectOp) -> Anchor:
    """The anchor of a method whose mathematics is one dialect op: ``function(site_id, *operands of the op)``.

    In a graph the call becomes the op; outside one the op's body runs, in the dtypes that it is given.
    """

    @torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
    def site(site_id: torch.Tensor, *operands: Any) -> torch.Tensor:
        with torch.autocast(site_id.device.type, enabled=False):
            return op.body(*operands)  # type: ignore[no-any-return]

    site.__name__ = site.__qualname__ = f"{op.name}_site"

    def expand(edit: Edit, site_id: fx.Node, operands: tuple[Any, ...]) -> fx.Node:
        return edit.call(op.overload, *operands)

    return Anchor(site, expand)
