"""Joins the optimizer shards of DeepSpeed's ZeRO stages 1 to 3 to whole tensors, and cuts them.

An optimizer of these stages steps flat float32 shards: a few on each rank, each with parts of many
parameters. The shards are the masters of the weights; a moment is as long as its shard.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from unimim.engine.distributed import gathered
from unimim.engine.optimizer_state import Named, elementwise_keys, latest, merged_groups
from unimim.engine.writing import on_host

CHUNK = 2**24  # how many numbers are exchanged at once


class Piece(NamedTuple):
    """What this rank has of a parameter: `size` of its numbers, in one shard.

    They begin at number `start` of the flattened parameter and at number `at` of the shard.
    """

    name: str
    shape: torch.Size
    shard: int
    at: int
    start: int
    size: int


class ZeroShards:
    """The shards of one ZeRO optimizer of DeepSpeed (`zero`) over a network.

    `names` are those of the parameters in each group, as they were before DeepSpeed took them.
    """

    def __init__(self, zero: Any, network: nn.Module, names: list[list[str]], device: torch.device):
        self.zero = zero
        self.optimizer: torch.optim.Optimizer = zero.optimizer
        self.names = names
        self.device = device
        self.partitions_weights = hasattr(zero, "fp32_partitioned_groups_flat")
        self.parameters = dict(network.named_parameters())

    def shards(self) -> list[Tensor]:
        """Return the flat float32 tensors that this rank's optimizer steps."""
        if self.partitions_weights:
            return list(self.zero.fp32_partitioned_groups_flat)
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def pieces(self) -> list[Piece]:
        """Return this rank's piece of every trained parameter, in the same order on all ranks."""
        find = self._partitioned if self.partitions_weights else self._spanned
        return [find(name, number) for number, own in enumerate(self.names) for name in own]

    def _spanned(self, name: str, group: int) -> Piece:
        """Return the piece of stages 1 and 2, whose shard is a span of a whole group."""
        parameter = self.parameters[name]
        mapping = parameter._hp_mapping
        if mapping is None:  # other ranks have all of it
            return Piece(name, parameter.shape, group, 0, 0, 0)
        span = mapping.lp_fragment_address
        at = mapping.hp_fragment_address.start
        return Piece(name, parameter.shape, group, at, span.start, span.numel)

    def _partitioned(self, name: str, _: int) -> Piece:
        """Return the piece of stage 3: an equal part of each parameter, padded at the end."""
        parameter = self.parameters[name]
        shard, at, size = self.zero.grad_position[self.zero.get_param_id(parameter)]
        start = min(size * self.zero._get_param_partition_rank(parameter), parameter.ds_numel)
        left = parameter.ds_numel - start
        return Piece(name, parameter.ds_shape, shard, at, start, min(size, left))

    # -- joining

    def whole_state(self) -> Named:
        """Return the named state of all parameters on rank 0, on the host; all ranks call."""
        shards = self.shards()
        pieces = self.pieces()
        own = [self.optimizer.state.get(shard, {}) for shard in shards]
        keys = self._keys(shards, own)
        state: dict[str, dict[str, Any]] = {piece.name: {} for piece in pieces}
        entries = [(piece, key) for piece in pieces for key in keys[piece.shard]]
        for piece, key, value in self._joined(entries, own):
            state[piece.name][key] = value
        if dist.get_rank():
            return {}
        for piece in pieces:
            rest = {k: v for k, v in own[piece.shard].items() if k not in keys[piece.shard]}
            state[piece.name] |= on_host(rest)
        groups = []
        for names, group in zip(self.names, self.optimizer.param_groups, strict=True):
            settings = {key: value for key, value in group.items() if key != "params"}
            groups.append({"names": names, **settings})
        return {"state": {name: value for name, value in state.items() if value}, "groups": groups}

    @staticmethod
    def _keys(shards: list[Tensor], own: list[dict[str, Any]]) -> list[list[str]]:
        """Return for each shard the keys that are as long as it, on any rank."""
        mine = []
        for shard, state in zip(shards, own, strict=True):
            fitting = [
                key
                for key, value in state.items()
                if isinstance(value, Tensor) and value.ndim and value.shape == shard.shape
            ]
            mine.append(fitting)
        together = zip(*gathered(mine), strict=True)
        return [sorted({key for keys in ranks for key in keys}) for ranks in together]

    def _joined(
        self, entries: list[tuple[Piece, str]], own: list[dict[str, Any]]
    ) -> Iterator[tuple[Piece, str, Tensor]]:
        """Yield each entry's whole float32 tensor on rank 0, and nothing on the others."""
        for chunk in chunked(entries):
            sizes = [piece.shape.numel() for piece, _ in chunk]
            flat = torch.zeros(sum(sizes), device=self.device)
            parts = flat.split(sizes)
            for (piece, key), part in zip(chunk, parts, strict=True):
                mine = own[piece.shard].get(key)
                if mine is not None and piece.size:
                    span = mine.detach().narrow(0, piece.at, piece.size)
                    part.narrow(0, piece.start, piece.size).copy_(span)
            # as integers: one rank alone has other bits than zeros, so that none of them changes
            dist.reduce(flat.view(torch.int32), dst=0)
            if dist.get_rank():
                continue
            for (piece, key), part in zip(chunk, parts, strict=True):
                yield piece, key, part.view(piece.shape).to("cpu", copy=True)

    # -- cutting

    @torch.no_grad()
    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Give the shards the whole float32 weights, of which the network may hold rounded ones."""
        shards = self.shards()
        for piece in self.pieces():
            if piece.size and piece.name in weights:
                _copy(weights[piece.name], shards[piece.shard], piece)

    @torch.no_grad()
    def load_state(self, saved: Named) -> None:
        """Give the optimizer this rank's part of a named state; what the state lacks is zero."""
        shards = self.shards()
        pieces = self.pieces()
        keys = elementwise_keys(saved, {piece.name: piece.shape for piece in pieces})
        state = []
        for number, shard in enumerate(shards):
            inside = [piece for piece in pieces if piece.shard == number]
            known = [saved["state"][p.name] for p in inside if p.name in saved["state"]]
            found = latest(known, keys)
            for key in sorted({key for one in known for key in one} & keys):
                found[key] = torch.zeros_like(shard)
                for piece in inside:
                    value = saved["state"].get(piece.name, {}).get(key)
                    if value is not None and piece.size:
                        _copy(value, found[key], piece)
            state.append(found)
        self._load(saved, shards, state)

    def _load(self, saved: Named, shards: list[Tensor], state: list[dict[str, Any]]) -> None:
        """Load the states of the shards the way that DeepSpeed loads its own files."""
        if self.partitions_weights:
            self.zero._set_fp32_optimizer_param_groups()
        numbers = {id(shard): number for number, shard in enumerate(shards)}
        groups = []
        order = []
        for group, merged in zip(
            self.optimizer.param_groups,
            merged_groups(saved, self.names, self.optimizer.param_groups),
            strict=True,
        ):
            first = len(order)
            order += [numbers[id(shard)] for shard in group["params"]]
            groups.append({**merged, "params": list(range(first, len(order)))})
        stepped = {place: state[number] for place, number in enumerate(order) if state[number]}
        self.optimizer.load_state_dict({"state": stepped, "param_groups": groups})
        if self.partitions_weights:
            self.zero._clear_fp32_optimizer_param_groups()


def chunked(entries: list[tuple[Piece, str]]) -> Iterator[list[tuple[Piece, str]]]:
    """Yield the entries in lists of at most CHUNK numbers, or of a single larger tensor."""
    chunk: list[tuple[Piece, str]] = []
    total = 0
    for entry in entries:
        size = entry[0].shape.numel()
        if chunk and total + size > CHUNK:
            yield chunk
            chunk = []
            total = 0
        chunk.append(entry)
        total += size
    if chunk:
        yield chunk


def _copy(whole: Tensor, flat: Tensor, piece: Piece) -> None:
    """Copy a piece of the whole tensor to its place in the flat one."""
    span = whole.reshape(-1).narrow(0, piece.start, piece.size)
    flat.narrow(0, piece.at, piece.size).copy_(span)
