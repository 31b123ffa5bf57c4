"""What the Gluon kernel uses of Gluon, on the CPU: the kernel's own source runs on it.

Partitions take turns at every operation on shared memory, by a schedule that a seed draws. What the
GPU does on its own happens as late as it may: copies when no partition can go on, in two pieces;
products at the wait that asks for them. Until then what they write is NaN.
"""

from __future__ import annotations

import functools
import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

KERNELS = Path(__file__).parents[1] / "kernels"
PARTITIONS = ("consumer 0", "consumer 1", "producer")


class Deadlock(Exception):
    """No partition can go on, and no copy is under way."""


class Misuse(Exception):
    """Something that hangs or is undefined on a GPU."""


class Stopped(BaseException):
    """Another partition failed."""


class Value(Tensor):
    """A tensor of registers. Nothing is changed in place."""

    @property
    def type(self) -> SimpleNamespace:
        return SimpleNamespace(layout=None)

    def __iadd__(self, other: Any) -> Value:
        return self + other

    def __isub__(self, other: Any) -> Value:
        return self - other

    def __imul__(self, other: Any) -> Value:
        return self * other


def value(tensor: Tensor) -> Value:
    return tensor.as_subclass(Value)


class Pointer:
    """Into a tensor's storage, by elements."""

    def __init__(self, storage: Tensor, offsets: Any = 0) -> None:
        self.storage, self.offsets = storage, offsets

    @classmethod
    def to(cls, tensor: Tensor) -> Pointer:
        size = tensor.untyped_storage().nbytes() // tensor.itemsize
        return cls(tensor.as_strided((size,), (1,), 0), tensor.storage_offset())

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.storage, self.offsets + more)

    def __sub__(self, less: Any) -> Pointer:
        return self + -less


class Buffer:
    """Shared memory. ours: as threads see it. theirs: as copies and the matrix unit do."""

    def __init__(self, ours: Tensor, theirs: Tensor) -> None:
        self.ours, self.theirs, self.dtype = ours, theirs, ours.dtype

    def index(self, place: int) -> Buffer:
        return Buffer(self.ours[place], self.theirs[place])

    def permute(self, order: tuple[int, int]) -> Buffer:
        return Buffer(self.ours.permute(order), self.theirs.permute(order))

    def store(self, given: Tensor) -> None:
        assert given.shape == self.ours.shape
        self.ours.copy_(given)
        machine().unfenced.append(self)


class Barrier:
    """An mbarrier."""

    def __init__(self) -> None:
        self.count: int | None = None

    def init(self, count: int) -> None:
        self.count = self.pending = count
        self.bytes = self.phase = 0
        self.fenced = False

    def changed(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.pending = self.count
            self.phase += 1

    def arrive(self) -> None:
        if self.pending == 0:
            raise Misuse("more arrivals in a phase than the barrier counts")
        self.pending -= 1
        self.changed()

    def is_over(self, parity: int) -> bool:
        return self.phase % 2 != parity


class Barriers:
    def __init__(self, shape: list[int]) -> None:
        self.all = [Barrier() for _ in range(shape[0])]
        self.shape = shape

    def index(self, place: int) -> Barrier:
        assert len(self.shape) == 2
        return self.all[place]


class Copy:
    """Of a box of rows to shared memory, in two pieces."""

    def __init__(self, box: Tensor, barrier: Barrier, target: Buffer) -> None:
        if not barrier.fenced:
            raise Misuse("a copy signals a barrier whose init no fence followed")
        assert box.shape == target.ours.shape
        self.box, self.barrier, self.target, self.done = box, barrier, target, 0
        target.ours.fill_(torch.nan)
        target.theirs.fill_(torch.nan)

    def go_on(self) -> bool:
        """Whether this was the last piece."""
        rows = len(self.box)
        stop = rows if self.done else max(1, rows // 2)
        for view in (self.target.ours, self.target.theirs):
            view[self.done : stop] = self.box[self.done : stop]
        self.barrier.bytes -= self.box[self.done : stop].nbytes
        self.done = stop
        self.barrier.changed()
        return stop == rows


class Product:
    """An asynchronous product, made when a wait asks for it."""

    def __init__(self, a: Any, b: Buffer, sums: Any, use_acc: bool) -> None:
        assert a.dtype == b.dtype
        self.operands, self.result = (a, b, sums, use_acc), None

    def make(self) -> None:
        a, b, sums, use_acc = self.operands
        left = a.theirs if isinstance(a, Buffer) else a
        product = left.float() @ b.theirs.float()
        self.result = value(product + sums if use_acc else product)
        self.operands = None

    def get(self) -> Value:
        if self.result is not None:
            return self.result
        return value(torch.full_like(self.operands[2], torch.nan))


class Partition:
    def __init__(self, name: str, body: Callable[[], None]) -> None:
        self.name, self.products = name, []
        self.ready: Callable[[], bool] = lambda: True
        self.waits_for = ""
        self.over, self.error = False, None
        self.go, self.gone = threading.Semaphore(0), threading.Semaphore(0)
        self.stopped = False
        self.thread = threading.Thread(target=self.run, args=(body,), daemon=True)

    def run(self, body: Callable[[], None]) -> None:
        self.go.acquire()
        _LOCAL.partition = self
        try:
            if not self.stopped:
                body()
            if self.products:
                raise Misuse(f"{self.name} ends with products under way")
        except Stopped:
            pass
        except BaseException as error:
            self.error = error
        self.over = True
        self.gone.release()

    def rest(self, ready: Callable[[], bool] = lambda: True, waits_for: str = "") -> None:
        """Let others go on until this is ready and its turn has come."""
        self.ready, self.waits_for = ready, waits_for
        self.gone.release()
        self.go.acquire()
        if self.stopped:
            raise Stopped

    def step(self) -> None:
        self.go.release()
        self.gone.acquire()


class Machine:
    """One program. rng: draws who goes on. order: instead, who goes before whom."""

    def __init__(self, program: int, rng: random.Random, order: tuple[int, ...] | None) -> None:
        self.program, self.rng, self.order = program, rng, order
        self.unfenced: list[Any] = []
        self.copies: list[Copy] = []
        self.barriers: list[Barrier] = []
        self.issued: list[str] = []

    def warp_specialize(
        self, bodies: list[tuple[Callable, tuple]], warps: list[int], registers: list[int]
    ) -> None:
        assert warps == [4, 1]
        assert len(registers) == 2
        partitions = [
            Partition(name, functools.partial(body, *arguments))
            for name, (body, arguments) in zip(PARTITIONS, bodies, strict=True)
        ]
        for partition in partitions:
            partition.thread.start()
        try:
            self.run(partitions)
        finally:
            for partition in partitions:
                partition.stopped = True
                if not partition.over:
                    partition.step()
                partition.thread.join()

    def run(self, partitions: list[Partition]) -> None:
        while live := [each for each in partitions if not each.over]:
            if able := [each for each in live if each.ready()]:
                chosen = self.rng.choice(able)
                if self.order:
                    chosen = min(able, key=lambda each: self.order[partitions.index(each)])
                chosen.step()
                if chosen.error:
                    raise chosen.error
            elif self.copies:
                if self.copies[0].go_on():
                    del self.copies[0]
            else:
                waits = "; ".join(f"{each.name} waits for {each.waits_for}" for each in live)
                raise Deadlock(waits)
        if self.copies:
            raise Misuse("a copy is under way at the end of the program")


_LOCAL = threading.local()
_NOW: list[Machine] = []


def machine() -> Machine:
    return _NOW[-1]


def rest() -> None:
    if partition := getattr(_LOCAL, "partition", None):
        partition.rest()


class Schedule:
    """How launches are scheduled from now on, and what the last one issued, by program."""

    seed = 0
    order: tuple[int, ...] | None = None
    issued: list[list[str]]


class Kernel:
    def __init__(self, body: Callable) -> None:
        self.body, self.__name__ = body, body.__name__

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self.body(*arguments, **named)

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        return functools.partial(self.launch, grid)

    def launch(self, grid: tuple[int], *given: Any, num_warps: int, **named: Any) -> None:
        assert num_warps == 4
        arguments = [Pointer.to(each) if isinstance(each, Tensor) else each for each in given]
        rng = random.Random(Schedule.seed)
        Schedule.issued = []
        for program in range(*grid):
            _NOW.append(Machine(program, rng, Schedule.order))
            try:
                self.body(*arguments, **named)
                Schedule.issued.append(machine().issued)
            finally:
                _NOW.pop()


def jit(body: Callable | None = None, **_: Any) -> Any:
    return Kernel(body) if body else Kernel


class Descriptor(SimpleNamespace):
    @classmethod
    def from_tensor(cls, tensor: Tensor, block: list[int], layout: Any) -> Descriptor:
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % 16 == 0
        return cls(tensor=tensor, block=block, layout=layout, dtype=tensor.dtype)


def load(pointer: Pointer, mask: Any = True, other: Any = None) -> Value:
    offsets = torch.as_tensor(pointer.offsets).as_subclass(Tensor)
    used = torch.as_tensor(mask).as_subclass(Tensor).broadcast_to(offsets.shape)
    found = pointer.storage[torch.where(used, offsets, 0)]
    return value(torch.where(used, found, torch.as_tensor(other or 0, dtype=found.dtype)))


def store(pointer: Pointer, given: Tensor) -> None:
    pointer.storage[pointer.offsets.as_subclass(Tensor)] = given.as_subclass(Tensor)


def where(condition: Any, one: Any, other: Any) -> Any:
    if not isinstance(condition, Tensor):
        return one if condition else other
    return value(torch.where(condition, one, other))


def paired(operation: Callable) -> Callable[[Any, Any], Value]:
    return lambda one, other: value(operation(torch.as_tensor(one), torch.as_tensor(other)))


def allocate_shared_memory(dtype: torch.dtype, shape: list[int], layout: Any) -> Any:
    if dtype == torch.int64:
        barriers = Barriers(shape)
        machine().barriers += barriers.all
        return barriers if len(shape) == 2 else barriers.all[0]
    return Buffer(*(torch.full(shape, torch.nan, dtype=dtype) for _ in range(2)))


def fence_async_shared() -> None:
    rest()
    for buffer in machine().unfenced:
        buffer.theirs.copy_(buffer.ours)
    machine().unfenced.clear()
    for barrier in machine().barriers:
        barrier.fenced = barrier.count is not None


def arrive(barrier: Barrier) -> None:
    rest()
    barrier.arrive()


def expect(barrier: Barrier, count: int) -> None:
    rest()
    barrier.bytes += count
    barrier.arrive()


def wait(barrier: Barrier, phase: int) -> None:
    _LOCAL.partition.rest(lambda: barrier.is_over(phase), f"a phase of parity {phase}")


def copy(source: Descriptor, place: list[int], barrier: Barrier, target: Buffer) -> None:
    rest()
    row, column = map(int, place)
    rows, columns = source.block
    box = source.tensor[row : row + rows, column : column + columns]
    box = torch.nn.functional.pad(box, (0, columns - box.shape[1], 0, rows - box.shape[0]))
    machine().copies.append(Copy(box, barrier, target))


def warpgroup_mma(
    a: Any, b: Buffer, acc: Tensor, *, use_acc: bool = True, is_async: bool = False
) -> Product:
    assert is_async
    rest()
    product = Product(a, b, acc, use_acc)
    _LOCAL.partition.products.append(product)
    if isinstance(a, Buffer):
        machine().issued.append(_LOCAL.partition.name)
    return product


def warpgroup_mma_wait(outstanding: int, deps: list[Product]) -> Value:
    rest()
    products = _LOCAL.partition.products
    while len(products) > outstanding:
        products.pop(0).make()
    [dependent] = deps
    return dependent.get()


def arange(start: int, stop: int, layout: Any = None) -> Value:
    return value(torch.arange(start, stop, dtype=torch.int32))


def layout(*_: Any, **__: Any) -> None:
    return None


def modules() -> Iterator[tuple[str, ModuleType]]:
    """Stand-ins for the modules that the kernel and its launch import."""
    base = "triton.experimental"
    language = ModuleType(f"{base}.gluon.language")
    language.__dict__.update(
        constexpr=lambda given: given,
        int32=torch.int32,
        int64=torch.int64,
        float32=torch.float32,
        program_id=lambda axis: value(torch.tensor(machine().program, dtype=torch.int32)),
        load=load,
        store=store,
        where=where,
        maximum=paired(torch.maximum),
        minimum=paired(torch.minimum),
        exp2=torch.exp2,
        max=lambda given, axis: given.amax(axis),
        sum=lambda given, axis: given.sum(axis),
        reshape=lambda given, shape: given.reshape(shape),
        convert_layout=lambda given, to: given,
        arange=arange,
        zeros=lambda shape, dtype, layout: value(torch.zeros(shape, dtype=dtype)),
        full=lambda shape, fill, dtype, layout: value(torch.full(shape, fill, dtype=dtype)),
        static_range=range,
        allocate_shared_memory=allocate_shared_memory,
        warp_specialize=lambda *given: machine().warp_specialize(*given),
    )
    for name in ("NVMMADistributed", "NVMMAShared", "DotOperand", "Slice", "Blocked"):
        setattr(language, f"{name}Layout", layout)
    hopper = ModuleType(f"{base}.gluon.language.nvidia.hopper")
    hopper.__dict__.update(
        fence_async_shared=fence_async_shared,
        mbarrier=SimpleNamespace(
            MBarrierLayout=layout, init=Barrier.init, expect=expect, arrive=arrive, wait=wait
        ),
        tma=SimpleNamespace(async_copy_global_to_shared=copy),
        warpgroup_mma=warpgroup_mma,
        warpgroup_mma_wait=warpgroup_mma_wait,
    )
    host = ModuleType(f"{base}.gluon.nvidia.hopper")
    host.TensorDescriptor = Descriptor
    gluon = ModuleType(f"{base}.gluon")
    gluon.jit, gluon.language = jit, language
    experimental = ModuleType(base)
    experimental.gluon = gluon
    for module in (experimental, gluon, language, hopper, host):
        yield module.__name__, module


@contextmanager
def stand_ins(more: dict[str, ModuleType]) -> Iterator[None]:
    instead = dict(modules()) | more
    before = {name: sys.modules.get(name) for name in instead}
    sys.modules.update(instead)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def execute(file: str, more: dict[str, ModuleType], old: str = "", new: str = "") -> ModuleType:
    """The module of a file below kernels/, with `old` in its text replaced, on the stand-ins."""
    path = KERNELS / file
    text = path.read_text()
    assert old in text, f"{path} has no {old!r}"
    module = ModuleType(f"emulated_{path.stem}")
    with stand_ins(more):
        exec(compile(text.replace(old, new) if old else text, path, "exec"), module.__dict__)
    return module


def kernels(old: str = "", new: str = "") -> ModuleType:
    """kernels/dc_loss_gluon_kernels.py, with `old` replaced by `new`."""
    return execute("dc_loss_gluon_kernels.py", {}, old, new)


def launcher(old: str = "", new: str = "") -> ModuleType:
    """kernels/dc_loss_gluon.py, which launches these kernels."""
    kernel = {"cac_fast.kernels.dc_loss_gluon_kernels": kernels(old, new)}
    return execute("dc_loss_gluon.py", kernel)
