"""Virtually hashed, physically indexed storage: tables of one dimension over one pool of chunks.

A store holds what its tables share: the headers of all rows, the pool, the states of a fused
optimizer, the clock of the decay. `DynamicEmbedding` and its relatives look up through it; after
each step of training `step()` gives rows that were seen for the first time their storage and, when
the schedule says so, lets a round decide anew which chunks keep theirs (`round.py`).
"""

from __future__ import annotations

import itertools
import logging
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mlkit.embeddings.fiited.budget import Plan, plan
from mlkit.embeddings.fiited.checkpoint import CLOCK, clashes, structure
from mlkit.embeddings.fiited.config import FIITEDConfig
from mlkit.embeddings.fiited.distributed import resolve_group
from mlkit.embeddings.fiited.ids import ExactIds, hash_rows, table_of
from mlkit.embeddings.fiited.initial import initial_values
from mlkit.embeddings.fiited.pages import ask_for_large_pages, new_zeros
from mlkit.embeddings.fiited.placement import Placement
from mlkit.embeddings.fiited.round import Round, RoundStats
from mlkit.embeddings.fiited.tables import Tables, TableSpec
from mlkit.embeddings.fiited.unseen import collect_unseen, evict_ids, insert_unseen
from mlkit.embeddings.fiited.warm_start import seed_utilities
from mlkit.embeddings.memory import MemoryReport
from mlkit.errors import InvalidTypeError, InvalidValueError, RunError
from mlkit_kernels.dynamic_embedding import HeaderLayout, RowGradients, Update
from mlkit_kernels.dynamic_embedding import op as kernels
from mlkit_kernels.dynamic_embedding.header import STEPS_PER_OCTAVE, decode, encode

__all__ = ["DynamicEmbeddingStore", "store_of"]

logger = logging.getLogger(__name__)

_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
_LARGEST_SCALE = 1e12
_FILL_BLOCK = 1 << 16
_FIRST_EXPONENT = -20  # of one-byte utilities: code 1 is 2^-20, code 255 about 2^12
_WINDOW_STEPS = (1, 2, 4, 8, 16)  # after which that window is moved to what is there, as in rounds
_LARGEST_EXPONENT = 90  # codes stay normal float32s, increments by a scale included
_LOW_CODE, _HIGH_CODE = 64, 239  # the largest code of a window that fits

_handles = itertools.count(1)
_stores: weakref.WeakValueDictionary[int, DynamicEmbeddingStore] = weakref.WeakValueDictionary()


def store_of(handle: int) -> DynamicEmbeddingStore:
    """Return the store with this `handle`."""
    store = _stores.get(handle)
    if store is None:
        raise RunError(f"the store of the lookup (handle {handle}) is gone: keep its module alive")
    return store


class DynamicEmbeddingStore(nn.Module):
    """Header, pool and optimizer state of tables of one dimension.

    Args:
        tables: The tables, in the order of their numbers.
        embedding_dim: D.
        config: Budget, schedule, optimizer.
        sparse: Whether an unfused backward gives the pool a sparse gradient.
        device: Of everything; `meta` builds the structure alone, then `to_empty` and
            `reset_parameters` or a checkpoint make it real.
        dtype: Of the weights: float32, bfloat16, or float64 for checks of gradients.

    Attributes:
        pool: [slots, C]. A parameter that an unfused optimizer trains.
        header: int32 [rows, words], see `mlkit_kernels.dynamic_embedding.header`.
        handle: A number by which the lookup op finds this store in its process.
        budget: Chunks that may be resident once a ramp has ended.
        target: Chunks that may be resident now.
        follow_checkpoints: Whether loading one takes over its budget, where `resize` changed it,
            instead of this store's own.
        steps: Calls of `step()`.
        num_nonfinite: Rows whose gradient held a NaN or an infinity so far.
        num_dropped: Times that an exact id map had no row for a new id; counted once in each step.
        grad_scale: What the loss was multiplied by, set by you before each backward pass where a
            `GradScaler` is at work, so that utilities do not change their unit with it.
        is_warm: Whether dense weights were written since the last round, whose chunks have earned
            nothing yet.
        rounds: Statistics of the rounds so far, the last 1000.

    Raises:
        InvalidValueError: For a budget below the headers, or K that does not divide D.
    """

    resizes_on_load = True
    pool: nn.Parameter
    header: Tensor
    keys: Tensor

    def __init__(
        self,
        tables: Sequence[TableSpec],
        embedding_dim: int,
        config: FIITEDConfig,
        *,
        sparse: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if dtype not in _DTYPES:
            raise InvalidTypeError(f"dtype must be float32, bfloat16 or float64, got {dtype}")
        self.tables = Tables(tables, spare=config.id_map == "exact")
        self.embedding_dim = embedding_dim
        self.config = config
        self.sparse = sparse
        self.plan = self._plan(None, dtype)
        self.budget = self.target = self.plan.num_chunks
        if config.ramp is not None:
            self.target = self.ramp_target(0)
            self.plan = self._plan(self.target, dtype)
        self.layout = self._layout(self.plan)
        slots, width = self.plan.num_slots, embedding_dim // config.num_chunks
        factory: dict[str, Any] = {"device": device}
        words = self.layout.words(config.num_chunks)
        header = torch.empty(self.tables.num_rows, words, dtype=torch.int32, **factory)
        self.register_buffer("header", header)
        if config.id_map == "exact":
            keys = torch.zeros(self.tables.num_rows, dtype=torch.int64, **factory)
            self.register_buffer("keys", keys)
        pool = torch.empty(slots, width, dtype=dtype, **factory)
        self.pool = nn.Parameter(pool, requires_grad=config.optimizer is None)
        for name, shape in self._state_shapes(slots, width).items():
            self.register_buffer(name, torch.empty(shape, dtype=torch.float32, **factory))
        if config.optimizer is not None:
            # What the graph hangs on where the pool has no gradient; it stays zero.
            self.anchor = nn.Parameter(torch.zeros(1, **factory))
        self.process_group: Any = "auto"
        self.grad_scale = 1.0
        self.follow_checkpoints = False
        self._exact: ExactIds | None = None
        self._driver: weakref.ref[Any] | None = None
        self._group_number = 0
        self._loading: list[str] | None = None
        self._register()
        self._start()
        if not pool.is_meta:
            self.reset_parameters()

    # ------------------------------------------------------------------ structure

    def _plan(
        self,
        chunks: int | None,
        dtype: torch.dtype | None = None,
        config: FIITEDConfig | None = None,
    ) -> Plan:
        return plan(
            config or self.config,
            self.tables.num_rows,
            self.embedding_dim,
            element_size=(dtype or self.pool.dtype).itemsize,
            padding_rows=len(self.tables.empty_rows),
            num_tables=len(self.tables.specs),
            chunks=chunks,
        )

    def _layout(self, of: Plan) -> HeaderLayout:
        return HeaderLayout.of(
            self.config.layout,
            num_chunks=self.config.num_chunks,
            num_slots=of.num_slots,
            row_state=self.config.optimizer == "rowwise_adagrad",
            utility_bytes=4 if self.config.utility_dtype == "float32" else 1,
        )

    def _state_shapes(self, slots: int, width: int) -> dict[str, tuple[int, ...]]:
        if self.config.optimizer == "adagrad":
            return {"sum": (slots, width)}
        if self.config.optimizer == "adam":
            return {"exp_avg": (slots, width), "exp_avg_sq": (slots, width), "step_count": (slots,)}
        return {}

    def _start(self) -> None:
        self.steps = 0
        self.num_nonfinite = 0
        self.rounds: list[RoundStats] = []
        self._log_scale = 0.0
        self._exponent = _FIRST_EXPONENT
        self._lr = torch.tensor(self.config.lr, dtype=torch.float64)
        self.pending: list[tuple[Sequence[int], RowGradients]] = []
        self.num_dropped = 0
        self.dropped = torch.zeros(len(self.tables.specs), dtype=torch.int64)
        self.unseen: list[Tensor] = []
        self._optimizers: list[tuple[torch.optim.Optimizer, Any]] = []
        self._has_warned = False
        self._seen: tuple[int, int] | None = None  # step and version of the pool, last backward
        self.is_warm = False
        self.has_earned = False  # whether a gradient came since the start, or since a load
        self._placement: Placement | None = None
        self._saved_free: Tensor | None = None
        self._extra: weakref.ref[Tensor] | None = None

    def reset_parameters(self) -> None:
        """Empty all rows; at density 1 fill them with their initial values."""
        optimizers = self._optimizers
        self._start()
        self._optimizers = optimizers
        with torch.no_grad():
            for tensor in (self.header, self.pool, *self.states):
                ask_for_large_pages(tensor)
                tensor.zero_()
            addresses = self.layout.addresses(self.header, self.config.num_chunks)
            addresses.fill_(0 if self.layout.slab else -1)
            if self.config.optimizer is not None:
                self.anchor.zero_()
            if self.exact_ids is not None:
                self.exact_ids.clear()
            if self.target == self._most:
                self._fill()

    @torch.no_grad()
    def _fill(self) -> None:
        """Make every row but padding and spare ones resident in full, with its initial values."""
        per_row = self.config.num_chunks
        full = (1 << per_row) - 1
        empty = self.tables.empty_rows
        for start in range(0, self.tables.num_rows, _FILL_BLOCK):
            stop = min(start + _FILL_BLOCK, self.tables.num_rows)
            rows = torch.arange(start, stop, device=self.header.device)
            for row in empty:
                rows = rows[rows != row]
            self.placement.set_masks(rows, torch.full_like(rows, full))
            self.write(rows, initial_values(self.config, self.tables, rows, self.embedding_dim))

    @property
    def root(self) -> nn.Parameter:
        """What the graph of a lookup hangs on."""
        return self.pool if self.config.optimizer is None else self.anchor

    @property
    def states(self) -> list[Tensor]:
        """States of a fused optimizer that are indexed by slot."""
        slots, width = self.pool.shape
        return [getattr(self, name) for name in self._state_shapes(slots, width)]

    @property
    def placement(self) -> Placement:
        """Where the chunks are; made from the header when it is first needed, or after a load."""
        if self._placement is None:
            self._placement = Placement(
                self.header,
                self.layout,
                self.config.num_chunks,
                len(self.pool),
                self.plan.page_slots,
                self.columns,
                self._saved_free,
            )
            self._saved_free = None
        return self._placement

    @property
    def exact_ids(self) -> ExactIds | None:
        """The table of keys of `id_map="exact"`."""
        if self.config.id_map != "exact":
            return None
        if self._exact is None or self._exact.keys is not self.keys:
            self._exact = ExactIds(self.tables, self.keys, self.config.seed)
        return self._exact

    def map_ids(
        self,
        ids: Int[Tensor, " n"],
        tables: Sequence[int],
        offsets: Tensor | None = None,
        *,
        collect: bool = False,
    ) -> Int[Tensor, " n"]:
        """Return the rows of ids within their tables; `lookup` does this.

        Args:
            ids: Any 64-bit integers, or rows where `id_map` is "identity".
            tables: Numbers of the tables whose ids these are, one after the other.
            offsets: Of the bags, to tell the tables apart.
            collect: Whether ids that an exact map does not know get rows in the next `step()`.
        """
        if self.config.id_map == "identity":
            return ids
        number: int | Tensor = tables[0]
        if len(tables) > 1:
            place = table_of(len(ids), len(tables), offsets, ids.device)
            number = torch.tensor(tables, device=ids.device)[place]
        if self.exact_ids is None:
            return hash_rows(self.tables, ids, number, self.config.seed)
        rows = self.exact_ids.find(ids, number)
        if collect:
            collect_unseen(self, ids, number, rows)
        return rows

    def columns(self) -> list[Tensor]:
        """Everything that is indexed by slot: the pool, and states of any optimizer."""
        found = [self.pool.detach(), *self.states]
        for state in self._unfused_states():
            found += [v for v in state.values() if self._is_column(v)]
        return found

    def _unfused_states(self) -> list[dict[str, Any]]:
        return [o.state[self.pool] for o, _ in self._optimizers if self.pool in o.state]

    def _is_column(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.dim() > 0 and len(value) == len(self.pool)

    def register_optimizer(self, optimizer: torch.optim.Optimizer) -> bool:
        """Keep the states of an optimizer of the pool with their chunks, and step after it.

        States whose first dimension is the pool's are moved with the chunks and zeroed where a slot
        is used anew; `step()` runs after each `optimizer.step()`.

        Returns:
            False if it was registered already.

        Raises:
            InvalidValueError: If the optimizer does not train the pool.
        """
        if any(optimizer is known for known, _ in self._optimizers):
            return False
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if id(self.pool) not in held:
            raise InvalidValueError(
                f"{type(optimizer).__name__} does not train the pool of "
                f"{', '.join(s.name for s in self.tables.specs[:3])}: give it model.parameters(), "
                "or use a fused optimizer (FIITEDConfig(optimizer=...))"
            )
        reference = weakref.ref(self)

        def after(*_: Any) -> None:
            store = reference()
            if store is not None:
                store.step()

        self._optimizers.append((optimizer, optimizer.register_step_post_hook(after)))
        return True

    def unregister_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Undo `register_optimizer`."""
        for known, hook in self._optimizers:
            if known is optimizer:
                hook.remove()
        self._optimizers = [o for o in self._optimizers if o[0] is not optimizer]

    def drive(self, optimizer: weakref.ref[Any], number: int) -> None:
        """Take the hyperparameters of a fused optimizer from a group of this one from now on."""
        self._driver, self._group_number = optimizer, number

    @property
    def driver(self) -> Any:
        """The `FusedEmbeddingOptimizer` of this store, or None."""
        return None if self._driver is None else self._driver()

    def _hyperparameters(self) -> dict[str, Any]:
        """Return lr, eps and betas of a fused optimizer as they are now."""
        driver = self.driver
        if driver is None:
            return {"lr": float(self._lr), "eps": self.config.eps, "betas": self.config.betas}
        group: dict[str, Any] = driver.param_groups[self._group_number]
        self._lr.fill_(float(group["lr"]))
        return group

    def _register(self) -> None:
        self.handle = next(_handles)
        _stores[self.handle] = self

    def __getstate__(self) -> dict[str, Any]:
        # A copy has a handle, free lists and optimizers of its own.
        state = self.__dict__.copy()
        if self._placement is not None:
            state["_saved_free"] = self._placement.free()
        return {
            **state,
            "_placement": None,
            "_exact": None,
            "_optimizers": [],
            "_driver": None,
            "pending": [],
            "_loading": None,
            "_extra": None,
            "unseen": [],
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._register()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        dtype = fn(self.pool.detach()[:0]).dtype
        if dtype not in _DTYPES:
            raise InvalidTypeError(
                f"the pool of {self.tables.specs[0].name} must be float32, bfloat16 or float64, "
                f"not {dtype}: convert the other modules alone, or use bfloat16"
            )
        if self._placement is not None and not self.header.is_meta:
            self._saved_free = self._placement.free()
        self._placement = None  # it holds the header that is replaced now
        states = {id(state) for state in self.states}

        def keep_states(tensor: Tensor) -> Tensor:
            found = fn(tensor)
            keeps = id(tensor) in states and found.dtype != tensor.dtype
            return tensor.to(found.device) if keeps else found

        before = self.pool.dtype
        super()._apply(keep_states, recurse)
        if dtype != before:
            self.plan = self._plan(self.plan.num_chunks)
        return self

    # -------------------------------------------------------------------- values

    @property
    def is_whole(self) -> bool:
        """Whether the target is density 1."""
        return self.target == self._most

    def share_of(self, table: int) -> int:
        """Return how many of the target's chunks a table gets in proportion to its rows."""
        spec = self.tables.specs[table]
        rows = spec.num_embeddings - (spec.padding_idx is not None)
        return self.target * rows * self.config.num_chunks // self._most

    @property
    def _most(self) -> int:
        rows = self.tables.num_rows - len(self.tables.empty_rows)
        return rows * self.config.num_chunks

    @property
    def num_chunks(self) -> int:
        """All chunks, with storage or without."""
        return self.tables.num_rows * self.config.num_chunks

    def density_of(self, chunks: int) -> float:
        """Fraction of all chunks."""
        return chunks / self.num_chunks

    @property
    def num_resident(self) -> int:
        """Chunks that have storage now."""
        return self.placement.num_resident

    def ramp_target(self, step: int) -> int:
        """Return how many chunks may be resident at a step."""
        final = self.density_of(self.budget)
        density = self.config.ramp_density(step, final)
        return (
            self.budget if density <= final else min(round(density * self.num_chunks), self._most)
        )

    @property
    def density(self) -> float:
        """Fraction of all chunks that have storage now."""
        return self.density_of(self.num_resident)

    def dims(self, table: int) -> Int[Tensor, " rows"]:
        """Return the present dimension of every row of a table."""
        resident = self.resident(self.tables.rows_of(table)).sum(1)
        return resident * (self.embedding_dim // self.config.num_chunks)

    def resident(self, rows: slice) -> Tensor:
        """Say which chunks of rows of the header have storage, bool [rows, K]."""
        addresses = self.layout.addresses(self.header[rows], self.config.num_chunks)
        return self.layout.slots(addresses, self.config.num_chunks) >= 0

    def utilities(self, rows: slice) -> Float[Tensor, "rows chunks"]:
        """Return the utilities of rows of the header, decayed up to now, float32."""
        found = self.layout.utilities(self.header[rows], self.config.num_chunks)
        if self.layout.utility_bytes == 1:
            found = decode(found, self._exponent)
        return found * math.exp(-self._log_scale)

    @property
    def exponent(self) -> int:
        """Of one-byte utilities, as they are stored."""
        return self._exponent

    @torch.no_grad()
    def put_utilities(self, rows: Tensor, values: Float[Tensor, "rows chunks"]) -> None:
        """Set the utilities of rows of the header, as of now."""
        values = values * math.exp(self._log_scale)
        if self.layout.utility_bytes == 1:
            per_row = self.config.num_chunks
            number = rows.unsqueeze(1) * per_row + torch.arange(per_row, device=rows.device)
            values = encode(values, number, self.steps, self._exponent)
        self.layout.utilities(self.header, self.config.num_chunks)[rows] = values

    @torch.no_grad()
    def write(self, rows: Int[Tensor, " rows"], values: Float[Tensor, "rows dim"]) -> None:
        """Set the resident chunks of rows of the header; what is not resident is left out."""
        slots = self.placement.slots(rows)
        resident = slots >= 0
        chunks = values.view(len(rows), self.config.num_chunks, self.pool.shape[1])
        self.pool.detach()[slots[resident]] = chunks[resident].to(self.pool.dtype)

    @torch.no_grad()
    def read(self, rows: Int[Tensor, " rows"]) -> Float[Tensor, "rows dim"]:
        """Return rows of the header, with zeros where a chunk is not resident."""
        slots = self.placement.slots(rows)
        values = self.pool.detach()[slots.clamp_min(0)]
        return torch.where((slots >= 0).unsqueeze(-1), values, 0).flatten(1)

    @torch.no_grad()
    def renormalise(self, table: int, indices: Tensor, max_norm: float, norm_type: float) -> None:
        """Shorten rows of a table to a p-norm of at most `max_norm`, as `nn.Embedding` does."""
        spec = self.tables.specs[table]
        inside = indices[(indices >= 0) & (indices < spec.num_embeddings)]
        rows = inside.unique().long() + self.tables.first[table]
        values = self.read(rows)
        norm = torch.linalg.vector_norm(values, norm_type, dim=1)
        longer = norm > max_norm
        scale = max_norm / (norm[longer] + 1e-7)
        self.write(rows[longer], values[longer] * scale.unsqueeze(1))
        self._seen = None

    def memory_report(self) -> MemoryReport:
        """Return the bytes of everything that is held now, headers included."""
        words = 4 * self.tables.num_rows
        row_state = words * self.layout.row_state
        unfused = [v for s in self._unfused_states() for v in s.values() if self._is_column(v)]
        return MemoryReport(
            weight_bytes=self.pool.nbytes,
            optimizer_bytes=sum(t.nbytes for t in (*self.states, *unfused)) + row_state,
            header_bytes=self.header.nbytes - row_state,
            allocator_bytes=self.placement.nbytes,
            other_bytes=0 if self.exact_ids is None else self.keys.nbytes,
            dense_bytes=self.plan.dense_bytes,
            dense_weight_bytes=self.plan.dense_weight_bytes,
        )

    # ------------------------------------------------------------------ training

    def update(self) -> Update:
        """Return what a backward pass of this step does."""
        config, fused = self.config, self._hyperparameters()
        counted = self.steps % config.utility_every == 0
        return Update(
            optimizer=config.optimizer or "none",
            lr=float(fused["lr"]),
            eps=float(fused["eps"]),
            beta1=float(fused["betas"][0]),
            beta2=float(fused["betas"][1]),
            utility=config.utility if counted and config.utility != "l2" else "none",
            scale=math.exp(self._log_scale),
            exponent=self._exponent,
            seed=(config.seed << 20) + self.steps,
            keep_new=self.num_resident < self.target,
        )

    def forget(self, rows: Int[Tensor, " rows"]) -> None:
        """Set the utilities and the row-wise state of rows of the header to zero."""
        self.layout.utilities(self.header, self.config.num_chunks)[rows] = 0
        if self.layout.row_state:
            self.layout.state(self.header, self.config.num_chunks)[rows] = 0

    @torch.no_grad()
    def step(self) -> RoundStats | None:
        """End a step of training: storage for new rows, the clock, and a round if one is due.

        Called by the optimizer's hook (`register_optimizer`, `FusedEmbeddingOptimizer`) or by the
        callback `EmbeddingBudget`; call it after `optimizer.step()` in a loop of your own.

        Returns:
            What the round did, or None if there was none.
        """
        self._admit_new()
        self.steps += 1
        self._log_scale -= math.log(self.config.decay_per_step)
        if self.layout.utility_bytes == 1 and self.steps in _WINDOW_STEPS:
            self._recentre()
        if self.config.is_round(self.steps):
            self._warn_unregistered()
            return self.prune_now()
        return None

    def warn_without_steps(self) -> None:
        """Say once that the pool was trained between two backward passes, and no step ended."""
        now = (self.steps, self.pool._version)
        before, self._seen = self._seen, now
        if before is None or before[0] != now[0] or before[1] == now[1] or self._has_warned:
            return
        if not self.is_whole:
            self._has_warned = True
            logger.warning(
                "%s was trained without store.step(): new rows get no storage and no round runs; "
                "call store.register_optimizer(optimizer), or use the callback EmbeddingBudget",
                self.tables.specs[0].name,
            )

    def _warn_unregistered(self) -> None:
        if self.config.optimizer is None and not self._optimizers and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "a round ran for %s, whose optimizer is not known: its states do not move with the "
                "chunks; call store.register_optimizer(optimizer), or use the callback "
                "EmbeddingBudget",
                self.tables.specs[0].name,
            )

    def _admit_new(self) -> None:
        """Give rows that were seen for the first time a place, as long as there is one."""
        pending, self.pending = [gradients for _, gradients in self.pending], []
        found = [gradients.rows for gradients in pending]
        if self.exact_ids is not None:
            found.append(insert_unseen(self))
        per_row = self.config.num_chunks
        free = self.target - self.num_resident
        if not found or free <= 0:
            return
        rows = torch.unique(torch.cat(found))
        rows = rows[(self.placement.slots(rows) < 0).all(1)][: -(-free // per_row)]
        if not len(rows):
            return
        size = (free - per_row * torch.arange(len(rows), device=rows.device)).clamp_max(per_row)
        self.placement.set_masks(rows, (1 << size) - 1)
        self.write(rows, initial_values(self.config, self.tables, rows, self.embedding_dim))
        if self.config.optimizer is None:
            return
        # The first gradients of a row were kept for this moment; their utility counts already.
        if self.layout.row_state:
            self.layout.state(self.header, per_row)[rows] = 0  # it was added without a chunk
        update = self.update()._replace(utility="none", keep_new=False)
        for gradients in pending:
            placed = torch.isin(gradients.rows, rows)
            kernels.apply(
                self.header, self.pool.detach(), self.states, self.layout, per_row,
                RowGradients(*(x[placed] for x in gradients)), update,
            )  # fmt: skip

    def prune_now(self, *, force: bool = False) -> RoundStats | None:
        """Run a pruning round now.

        Args:
            force: Whatever the trigger says.

        Returns:
            What it did; None if the trigger said that it does not pay.
        """
        target = self.ramp_target(self.steps)
        lowered = target < self.target
        if lowered and self.config.optimizer is None and self.group() is not None:
            raise RunError(
                "a ramp changes the pool's shape, which DDP does not follow: leave ramp out, or "
                "use a fused optimizer, FIITEDConfig(optimizer=...)"
            )
        self.target = target
        if self.is_warm:
            seed_utilities(self)
            self.is_warm = False
        stats = Round(self).run(force=force or lowered)
        if self.exact_ids is not None:
            evict_ids(self)
        if lowered:
            self._repack(self._plan(target))
        self._recentre()
        if stats is not None:
            self.rounds = [*self.rounds[-999:], stats]
        return stats

    def _recentre(self) -> None:
        """Fold the decay's scale into the utilities, and move the window of one-byte ones."""
        stored = self.layout.utilities(self.header, self.config.num_chunks)
        if self.layout.utility_bytes == 4:
            if self._log_scale > math.log(_LARGEST_SCALE):
                stored.mul_(math.exp(-self._log_scale))
                self._log_scale = 0.0
            return
        octaves = math.floor(self._log_scale / math.log(2))
        if octaves >= 4:
            self._shift_codes(stored, -octaves)
            self._log_scale -= octaves * math.log(2)
        top = int(stored.max()) if stored.numel() else 0
        if top > _HIGH_CODE or (top < _LOW_CODE and self.has_earned):
            octaves = ((_LOW_CODE + _HIGH_CODE) // 2 - top) // STEPS_PER_OCTAVE
            before = self._exponent
            self._exponent = min(max(before - octaves, -_LARGEST_EXPONENT), _LARGEST_EXPONENT)
            self._shift_codes(stored, before - self._exponent)

    def _shift_codes(self, stored: Tensor, octaves: int) -> None:
        """Move one-byte codes; 0 stays, and so does 1, which says "no more than this"."""
        shift = STEPS_PER_OCTAVE * octaves
        for block in stored.split(_FILL_BLOCK):
            code = block.short()
            block.copy_(torch.where(code > 1, (code + shift).clamp(1, 255), code))

    # -------------------------------------------------------------------- budget

    def resize(self, chunks: int) -> None:
        """Let `chunks` chunks be resident from now on.

        Shrinking runs a round to the new target, then moves what is left into a smaller pool;
        growing moves all into a larger one. Both hold the old and the new pool for a moment. DDP
        with an unfused optimizer must be wrapped again, as the pool's shape changes.

        Raises:
            InvalidValueError: For less than a chunk of each table, or more than there are.
        """
        least = min(len(self.tables.specs), self._most)
        if not least <= chunks <= self._most:
            raise InvalidValueError(
                f"{self.tables.specs[0].name}: the number of chunks must be in "
                f"{least}..{self._most}, got {chunks}"
            )
        self.budget, self.config = chunks, replace(self.config, ramp=None, ramp_from=None)
        self.target = chunks
        if self.num_resident > chunks:
            self.prune_now(force=True)
        self._repack(self._plan(chunks))

    @torch.no_grad()
    def _repack(self, new: Plan) -> None:
        if self._layout(new) != self.layout:
            raise RunError(
                f"{new.num_slots} slots need addresses of another width than the header has: make "
                "a new store and load a checkpoint of this one"
            )
        columns = self.columns()
        made = [new_zeros(c, new.num_slots, *c.shape[1:]) for c in columns]

        def copy(old: Tensor, at: Tensor) -> None:
            for column, target in zip(columns, made, strict=True):
                target[at] = column[old]

        self.placement.repack(copy, new.page_slots)
        replaced = dict(zip(map(_address, columns), made, strict=True))
        for state in self._unfused_states():
            for key, value in state.items():
                if self._is_column(value):
                    state[key] = replaced[_address(value)]
        for name, value in zip(self._state_shapes(1, 1), made[1:], strict=False):
            setattr(self, name, value)
        self.pool.data, self.pool.grad = made[0], None
        self.plan, self._placement = new, None

    def rebudget(self, config: FIITEDConfig) -> None:
        """`resize` to what the budget or density of another config leaves."""
        self.resize(self._plan(None, config=config).num_chunks)

    def retarget(self, density: float) -> None:
        """`resize` to a density of all chunks, in (0, 1]."""
        if not 0 < density <= 1:
            raise InvalidValueError(f"target_density must be in (0, 1], got {density}")
        self.resize(max(len(self.tables.specs), min(round(density * self.num_chunks), self._most)))

    def group(self) -> Any:
        """Return the process group whose ranks must decide alike, or None."""
        return resolve_group(self.process_group)

    # --------------------------------------------------------------- checkpoints

    def get_extra_state(self) -> Tensor:
        """Return clock, counters and free lists, as a tensor for every kind of checkpoint."""
        counts = [self.steps, self.num_nonfinite, self.plan.num_chunks, self.num_dropped]
        values = [*counts, self._log_scale, self._exponent, float(self._lr), float(self.is_warm)]
        clock = torch.tensor([*values, *structure(self).values()], dtype=torch.float64)
        free = clock[:0] if self.header.is_meta else self.placement.free().double().cpu()
        found = torch.cat([clock, self.dropped.double(), free])
        # A store that several modules share gives the same tensor to each of them.
        before = None if self._extra is None else self._extra()
        if before is not None and torch.equal(before, found):
            return before
        self._extra = weakref.ref(found)
        return found

    def set_extra_state(self, state: Tensor) -> None:
        """Take the clock of a checkpoint; the target stays this store's own."""
        steps, nonfinite, _, num_dropped, log_scale, exponent, lr, warm = state[:CLOCK].tolist()
        self.is_warm = bool(warm)
        self.steps, self._log_scale, self._exponent = int(steps), log_scale, int(exponent)
        self.num_nonfinite, self.num_dropped = int(nonfinite), int(num_dropped)
        self._lr.fill_(lr)
        rest = state[CLOCK + len(structure(self)) :].long()
        self.dropped = rest[: len(self.tables.specs)].cpu()
        free = rest[len(self.tables.specs) :]
        self._saved_free = free if len(free) else None

    def is_first_visit(self, error_msgs: list[str]) -> bool:
        """Say whether this call of `load_state_dict` comes here for the first time.

        A store that several modules share is reached through each of them. A call is known by its
        list of errors.
        """
        seen, self._loading = self._loading is error_msgs, error_msgs
        return not seen

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load a checkpoint of any budget, then come back to this store's own."""
        if not self.is_first_visit(error_msgs):
            return
        extra = state_dict.get(f"{prefix}_extra_state")
        found = clashes(self, extra) if isinstance(extra, Tensor) else []
        if found:
            names = ", ".join(spec.name for spec in self.tables.specs[:3])
            error_msgs.append(
                f"the checkpoint of {prefix.rstrip('.') or 'the store'} ({names}) does not fit: "
                f"{'; '.join(found)}. A budget may differ, these may not"
            )
            return
        own, began = self.target, self.budget if self.config.ramp is None else self.ramp_target(0)
        self.pending, self._placement, self.unseen = [], None, []
        if isinstance(extra, Tensor) and int(extra[2]) != self.plan.num_chunks:
            self._take_plan(self._plan(int(extra[2])))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if self.budget <= self.plan.num_chunks <= began:
            own = self.plan.num_chunks  # as far as the ramp was
        elif self.follow_checkpoints:
            own = self.budget = self.plan.num_chunks
            self.config = replace(self.config, ramp=None, ramp_from=None)
        self.target = own
        if self.plan.num_chunks != own and not self.header.is_meta:
            if self.num_resident > own:
                Round(self).run(force=True)
            self._repack(self._plan(own))

    def _take_plan(self, new: Plan) -> None:
        """Make room for the pool of a checkpoint."""
        if self._layout(new) != self.layout:
            raise RunError("the checkpoint's pool has addresses of another width than this store's")
        shapes = self._state_shapes(new.num_slots, self.pool.shape[1])
        for name, shape in shapes.items():
            setattr(self, name, self.header.new_zeros(shape, dtype=torch.float32))
        self.pool.data = new_zeros(self.pool, new.num_slots, self.pool.shape[1])
        self.pool.grad = None
        self.plan = new

    def extra_repr(self) -> str:
        """Return the tables in short."""
        return (
            f"tables={len(self.tables.specs)}, rows={self.tables.num_rows}, "
            f"dim={self.embedding_dim}, num_chunks={self.config.num_chunks}, target={self.target}"
        )


def _address(tensor: Tensor) -> int:
    return tensor.data_ptr()
