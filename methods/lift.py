"""`Lifted`: edits as they are run and exported, where powers of two have moved from inputs into the rows that write these.

A method that scales the inputs of down or o has nothing to fold the scale into but the rows of up or v, which are another site with an
edit of its own. So it stores powers of two beside its codes (`turn.power`), and decodes to a weight for the inputs as they are:
edits stay independent of one another, wherever weights are decoded. Kernels and files of other tools have no place for such a part.
Here the part goes, and the rows of the feeding linear, compressed or dense, take the powers over. Powers of two move through
products and sums without rounding, so that the model is the same bit for bit, barring numbers outside a dtype's range. A cache that
rounds values is filled with them as they run, lifted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from methods.formats.numerics import Compressed
from methods.formats.rows import lifted, multiplied
from methods.formats.turns import POWER
from methods.method import Edit
from methods.model.structure import Feed, Site, Structure
from methods.model.weights import weight_of


@dataclass(frozen=True)
class _Lift:
    """power: (d_out,) int8, of the feeding layer's rows; home: the site whose edit holds its parameters, dense ones included."""

    layer: str
    power: Tensor
    home: str

    @property
    def factor(self) -> Tensor:
        return torch.exp2(self.power.float())


class Lifted(Mapping[str, Edit]):
    """Edits by site with their powers of two moved into the rows that feed them; each is made when it is asked for.

    edits: as methods made them, or these without some; model: without edits in it, as its dense rows are read. kept: by site, why the
    rows before it cannot take its powers, which it then has still.
    """

    def __init__(self, edits: Mapping[str, Edit], structure: Structure, model: nn.Module) -> None:
        self._edits, self._model = edits, model
        self._transposed = {layer.name for _, layer in structure.layers() if layer.transposed}
        self._site_of = {layer.name: site.name for site, layer in structure.layers()}
        # References to what the model holds now: edits that are installed later do not change them.
        self._stored: dict[str, Tensor] = {}
        self._lifts: dict[str, list[_Lift]] = {}
        self._lifted: set[str] = set()
        self.kept: dict[str, str] = {}
        for site in structure.sites:
            if site.feed is not None and site.name in edits:
                self._plan(site, site.feed)

    def __getitem__(self, site: str) -> Edit:
        edit = self._edits[site]
        linears = {name: _without_power(c) if site in self._lifted else c for name, c in edit.linears.items()}
        return self._with_rows(Edit(linears, edit.tensors), self._lifts.get(site, ()))

    def __iter__(self) -> Iterator[str]:
        return iter(self._edits)

    def __len__(self) -> int:
        return len(self._edits)

    def _plan(self, site: Site, feed: Feed) -> None:
        """Decides what becomes of a site's powers."""
        powers = [c.payload[POWER] for c in self._edits[site.name].linears.values() if POWER in c.payload]
        if not powers:
            return
        module = self._model.get_submodule(feed.layer)
        for name, parameter in module.named_parameters(recurse=False):
            self._stored[f"{feed.layer}.{name}"] = parameter.detach()
        home = self._site_of[feed.layer] if self._site_of[feed.layer] in self._edits else site.name
        power = torch.zeros(weight_of(module).shape[0], dtype=powers[0].dtype)
        power[feed.rows(site.d_in)] = powers[0]
        lift = _Lift(feed.layer, power, home)
        try:
            self._with_rows(self._edits[home], [lift])
        except ValueError as error:
            self.kept[site.name] = f"{feed.layer} cannot be multiplied by powers of two: {error}"
            return
        self._lifts.setdefault(home, []).append(lift)
        self._lifted.add(site.name)

    def _with_rows(self, edit: Edit, lifts: list[_Lift] | tuple[()]) -> Edit:
        """The edit with the rows of feeding layers lifted; what it does not hold of them comes from the model."""
        linears, tensors = dict(edit.linears), dict(edit.tensors)
        for lift in lifts:
            if lift.layer in linears:
                linears[lift.layer] = lifted(linears[lift.layer], lift.power)
            for name in (f"{lift.layer}.weight", f"{lift.layer}.bias"):
                if name in self._stored and not (name.endswith(".weight") and lift.layer in linears):
                    tensors[name] = self._multiplied(name, tensors.get(name, self._stored[name]), lift)
        return Edit(linears, tensors)

    def _multiplied(self, name: str, tensor: Tensor, lift: _Lift) -> Tensor:
        by_column = name.endswith(".weight") and lift.layer in self._transposed
        return multiplied(name, tensor.T, lift.factor).T if by_column else multiplied(name, tensor, lift.factor)


def _without_power(compressed: Compressed) -> Compressed:
    payload = {part: tensor for part, tensor in compressed.payload.items() if part != POWER}
    return Compressed.of(compressed.format, payload)
