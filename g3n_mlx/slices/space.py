"""What a search may choose, and what it costs.

A candidate says for every layer of the checkpoint how wide its FFN is, 0 where the layer is skipped, and, where bits
are searched too, at how many the attention and the FFN are stored; the matrices outside the layers have bits of their
own, and so have the per-layer gates of all layers, and LAuReL's. KV-sharing layers are skipped in blocks that end where
a layer with full attention does, as in the published slices, which skip layers 20 to 24 of E4B. Costs add up: what a
layer takes does not depend on the others, but for the bits of its rows of the PLE projection.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from typing import NamedTuple

from g3n_mlx.checkpoint.folder import Checkpoint
from g3n_mlx.config.manifest import TEXT
from g3n_mlx.config.text import FULL, TextConfig
from g3n_mlx.convert import DEFAULT_PLE_BITS
from g3n_mlx.failures import BadValue
from g3n_mlx.matformer.plan import SlicePlan, plan_slice
from g3n_mlx.matformer.table import Slice, short_name
from g3n_mlx.slices.solve import Option, solve, undominated

# A width is rounded down to whole groups of the checkpoint's quantization, or of the usual one.
_USUAL_GROUP = 64
UNCHANGED = 0  # bits of what stays as the checkpoint has it


class Layer(NamedTuple):
    """What is chosen for one layer."""

    width: int  # of the FFN; 0: the layer is skipped
    attention_bits: int = UNCHANGED
    ffn_bits: int = UNCHANGED


class Outside(NamedTuple):
    """Bits of the matrices outside the layers, and of small ones that are the same in all of them."""

    token_bits: int = UNCHANGED  # of the token table, which is the head too
    other_bits: int = UNCHANGED  # AltUp's and the PLE projections
    gate_bits: int = UNCHANGED  # the per-layer gates and their projections
    ple_bits: int = UNCHANGED  # of the PLE table
    laurel_bits: int = UNCHANGED


class Candidate(NamedTuple):
    """One way to make a smaller model; hashable, and a key of the journal by its `repr`."""

    layers: tuple[Layer, ...]  # of the checkpoint, skipped ones included
    outside: Outside = Outside()

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(layer.width for layer in self.layers)

    def at(self, bits: int) -> "Candidate":
        """The same widths as a conversion to so many bits stores them."""
        layers = tuple(Layer(layer.width, bits, bits) if layer.width else layer for layer in self.layers)
        return Candidate(layers, Outside(bits, bits, bits, DEFAULT_PLE_BITS) if bits else Outside())

    def changed(self, layers: Mapping[int, Layer]) -> "Candidate":
        return self._replace(layers=tuple(layers.get(at, layer) for at, layer in enumerate(self.layers)))


SKIPPED = Layer(0)
Cost = Callable[[Candidate], int]


@dataclass(frozen=True, slots=True)
class Space:
    """The candidates of one checkpoint."""

    whole: Candidate
    widths: tuple[tuple[int, ...], ...]  # per layer, ascending, the whole width last
    blocks: tuple[tuple[int, ...], ...]  # layers that may be skipped together
    bits: tuple[int, ...]  # of layers, ascending, UNCHANGED last; (UNCHANGED,) where they are not searched
    outside: tuple[tuple[int, ...], ...]  # the same of each field of Outside

    def changes(self) -> list[Candidate]:
        """Every candidate that differs from the whole model in one choice."""
        return [candidate for candidate in dict.fromkeys(self._changes()) if candidate != self.whole]

    def _changes(self) -> list[Candidate]:
        whole, found = self.whole, list[Candidate]()
        for at, widths in enumerate(self.widths):
            layer = whole.layers[at]
            found += [whole.changed({at: layer._replace(width=width)}) for width in widths]
            found += [whole.changed({at: layer._replace(attention_bits=bits)}) for bits in self.bits]
            found += [whole.changed({at: layer._replace(ffn_bits=bits)}) for bits in self.bits]
        found += [whole.changed(dict.fromkeys(block, SKIPPED)) for block in self.blocks]
        for name, scale in zip(Outside._fields, self.outside, strict=True):
            if len(scale) > 1 or scale == self.bits:
                found += [whole._replace(outside=Outside(**{name: bits})) for bits in scale]
        return found

    def loss(self, candidate: Candidate, losses: Mapping[Candidate, float]) -> float:
        """The sum of the losses of a candidate's changes. losses: of every one of `changes`."""
        total = self._outside_loss(candidate.outside, losses)
        skipped = [block for block in self.blocks if not any(candidate.layers[at].width for at in block)]
        total += sum(losses[self.whole.changed(dict.fromkeys(block, SKIPPED))] for block in skipped)
        gone = {at for block in skipped for at in block}
        return total + sum(
            self._layer_loss(at, layer, losses) for at, layer in enumerate(candidate.layers) if at not in gone
        )

    def holds(self, candidate: Candidate) -> bool:
        """Whether it is made of what may be chosen: other tables may have other widths, or skip parts of a block."""
        skipped = {at for block in self.blocks if not any(candidate.layers[at].width for at in block) for at in block}
        return all(at in skipped or layer.width in self.widths[at] for at, layer in enumerate(candidate.layers))

    def best(self, losses: Mapping[Candidate, float], cost: Cost, budget: int) -> Candidate | None:
        """The candidate within a budget with the least sum of losses; None where even the cheapest exceeds it."""
        base = cost(self.whole)
        groups: dict[tuple[int, ...], list[Option]] = {}
        for at in set(range(len(self.widths))) - {at for block in self.blocks for at in block}:
            groups[at,] = self._of_layer(at, losses, cost)
        for block in self.blocks:
            skipped = self.whole.changed(dict.fromkeys(block, SKIPPED))
            skip = Option(cost(skipped) - base, losses[skipped], (SKIPPED,) * len(block))
            groups[block] = [skip, *undominated([self._of_layer(at, losses, cost) for at in block])]
        outside = [
            self._of_outside(name, scale, losses, cost)
            for name, scale in zip(Outside._fields, self.outside, strict=True)
        ]
        in_order, excess = [*(groups[layers] for layers in sorted(groups)), *outside], 0
        while found := solve(in_order, budget - base - excess):
            layers, chosen = found.values[: len(self.widths)], found.values[len(self.widths) :]
            candidate = Candidate(layers, Outside(*chosen))  # pyright: ignore[reportArgumentType]
            if cost(candidate) <= budget:
                return candidate
            excess += cost(candidate) - budget
        return None

    def _of_outside(
        self, name: str, scale: Sequence[int], losses: Mapping[Candidate, float], cost: Cost
    ) -> list[Option]:
        options: list[Option] = []
        for bits in scale:
            changed = self.whole._replace(outside=Outside(**{name: bits}))
            loss = self._outside_loss(changed.outside, losses)
            options.append(Option(cost(changed) - cost(self.whole), loss, (bits,)))
        return undominated([options])

    def _of_layer(self, at: int, losses: Mapping[Candidate, float], cost: Cost) -> list[Option]:
        choices = map(Layer._make, product(self.widths[at], self.bits, self.bits))
        options = [
            Option(
                cost(self.whole.changed({at: choice})) - cost(self.whole),
                self._layer_loss(at, choice, losses),
                (choice,),
            )
            for choice in choices
        ]
        return undominated([options])

    def _layer_loss(self, at: int, choice: Layer, losses: Mapping[Candidate, float]) -> float:
        whole = self.whole.layers[at]
        parts = (
            whole._replace(width=choice.width),
            whole._replace(attention_bits=choice.attention_bits),
            whole._replace(ffn_bits=choice.ffn_bits),
        )
        return sum(losses[self.whole.changed({at: part})] for part in parts if part != whole)

    def _outside_loss(self, choice: Outside, losses: Mapping[Candidate, float]) -> float:
        """What is not searched, the one value of its scale, is not measured either."""
        parts = (Outside(**{name: bits}) for name, bits in choice._asdict().items())
        changes = (self.whole._replace(outside=part) for part in parts if part != Outside())
        return sum(losses.get(change, 0.0) for change in changes)

    def cheapest(self) -> Candidate:
        """The least of everything."""
        low = self.bits[0]
        in_a_block = {at for block in self.blocks for at in block}
        layers = [SKIPPED if at in in_a_block else Layer(widths[0], low, low) for at, widths in enumerate(self.widths)]
        return Candidate(tuple(layers), Outside(*(scale[0] for scale in self.outside)))

    def neighbours(self, candidate: Candidate) -> set[Candidate]:
        """Candidates one step larger, one smaller, or both: a width, the bits of a part, or a block."""
        smaller = [candidate, *self._steps(candidate, -1)]
        return {larger for start in smaller for larger in (start, *self._steps(start, 1))} - {candidate}

    def _steps(self, candidate: Candidate, direction: int) -> list[Candidate]:
        found: list[Candidate] = []
        for at, layer in enumerate(candidate.layers):
            if layer.width:
                found += [
                    candidate.changed({at: layer._replace(**{name: value})})
                    for name, scale in (
                        ("width", self.widths[at]),
                        ("attention_bits", self.bits),
                        ("ffn_bits", self.bits),
                    )
                    for value in _next(scale, getattr(layer, name), direction)
                ]
        for name, scale in zip(Outside._fields, self.outside, strict=True):
            for value in _next(scale, getattr(candidate.outside, name), direction):
                found.append(candidate._replace(outside=candidate.outside._replace(**{name: value})))
        for block in self.blocks:
            kept = any(candidate.layers[at].width for at in block)
            if direction < 0 and kept:
                found.append(candidate.changed(dict.fromkeys(block, SKIPPED)))
            if direction > 0 and not kept:
                bits = self.bits[-1]
                found.append(candidate.changed({at: Layer(self.widths[at][-1], bits, bits) for at in block}))
                found.append(candidate.changed({at: Layer(self.widths[at][0], bits, bits) for at in block}))
        return found


def space_of(checkpoint: Checkpoint, fractions: Sequence[Fraction], bits: Sequence[int]) -> Space:
    """The candidates whose layers have these fractions of their width, or all of it; bits: of a dense checkpoint.

    Raises ValueError when a fraction leaves no whole group of a layer.
    """
    text = checkpoint.config.text
    widths: list[tuple[int, ...]] = []
    for at, whole in enumerate(text.intermediate_size):
        quantization = checkpoint.quantization(f"{TEXT}layers.{at}.mlp.down_proj")
        group = quantization.group_size if quantization else _USUAL_GROUP if whole % _USUAL_GROUP == 0 else 1
        offered = {int(whole * fraction) // group * group for fraction in fractions}
        if not min(offered, default=whole):
            raise BadValue(
                f"--widths has {float(min(fractions)):g}, which leaves no group of {group} of the {whole} units of "
                f"layer {at}"
            )
        widths.append((*sorted(offered - {whole}), whole))
    layers, scale = tuple(map(Layer, text.intermediate_size)), tuple(sorted(bits)) or (UNCHANGED,)
    # The PLE table stays on disk and costs no memory, and LAuReL's matrices are small.
    ple = (DEFAULT_PLE_BITS if bits else UNCHANGED,)
    return Space(Candidate(layers), tuple(widths), _blocks(text), scale, (scale, scale, scale, ple, (UNCHANGED,)))


def bits_space(text: TextConfig, bits: Sequence[int]) -> Space:
    """The whole model with every part at some bits, or as it is."""
    layers, scale = tuple(map(Layer, text.intermediate_size)), (*sorted(bits), UNCHANGED)
    widths = tuple((width,) for width in text.intermediate_size)
    return Space(Candidate(layers), widths, (), scale, (scale,) * len(Outside._fields))


def _next(scale: Sequence[int], value: int, direction: int) -> Sequence[int]:
    """The value beside one of a scale, if there is one; of a value that is not on it, nothing."""
    at = scale.index(value) + direction if value in scale else -1
    return scale[at : at + 1] if at >= 0 else ()


def _blocks(text: TextConfig) -> tuple[tuple[int, ...], ...]:
    """The KV-sharing layers, cut behind every layer with full attention."""
    blocks: list[tuple[int, ...]] = []
    block: tuple[int, ...] = ()
    for at in range(text.first_kv_shared_layer, text.num_hidden_layers):
        block = (*block, at)
        if text.layer_types[at] == FULL or at == text.num_hidden_layers - 1:
            blocks.append(block)
            block = ()
    return tuple(blocks)


def slice_row(candidate: Candidate, name: str, effective_params_b: float | None = None) -> Slice:
    """The widths of a candidate as a row of a table of slices."""
    kept = tuple(width for width in candidate.widths if width)
    skipped = tuple(at for at, width in enumerate(candidate.widths) if not width)
    return Slice(name, short_name(name), len(kept), effective_params_b, None, kept, skipped)


def plan_of(text: TextConfig, candidate: Candidate) -> SlicePlan:
    """The widths of a candidate as the plan of a slice."""
    return plan_slice(text, slice_row(candidate, "candidate"))


def candidate_of(text: TextConfig, chosen: Slice) -> Candidate:
    """A row of a table as a candidate; raises ValueError where it does not fit."""
    plan = plan_slice(text, chosen)
    by_layer = dict(zip(plan.kept_layers, plan.intermediate_size, strict=True))
    return Candidate(tuple(Layer(by_layer.get(at, 0)) for at in range(text.num_hidden_layers)))
