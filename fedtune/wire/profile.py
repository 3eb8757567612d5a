"""What a client says of itself before the first round: who it is, which base it holds, what its device carries."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fedtune.directions.seed_ledger import decode_manifest
from fedtune.errors import WireError
from fedtune.lora.virtual_tokens import are_virtual
from fedtune.pruning.structure import FAMILIES, Block, BlockLayout, linear_shapes
from fedtune.tensors import Tensors, digest
from fedtune.wire.codec import EncodedAssignment, body_of, decode_blob, encode_blob, outline_of, parse
from fedtune.wire.expect import LARGEST, MAX_COUNT
from fedtune.wire.v1 import round_pb2 as pb

PROTOCOL = 1
"""Version of the messages of a round; peers of another one do not understand each other."""

MAX_NAME = 100
MAX_LABELS = 10_000


@dataclass(frozen=True)
class Device:
    """The device of a client; zero and the empty text where something is not known."""

    memory_bytes: int = 0
    """Main memory of the machine."""
    cores: int = 0
    """CPU cores that the process may use."""
    accelerator: str = ""
    s_per_tflop: float | None = None
    """Seconds for 1e12 operations, as it has just measured; None where it has not."""
    s_per_mb: float | None = None
    """Seconds for a megabyte, measured likewise."""


@dataclass(frozen=True)
class ModelSpec:
    """What all clients of a run must have in common: the base, and what is trained on it."""

    base: str
    """Digest (hex) of the base model."""
    modules: Mapping[str, tuple[int, int]]
    """(out, in) of every module that gets an adapter, by full name in sorted order."""
    saved: Tensors = field(default_factory=dict)
    """Initial values of modules_to_save, by parameter name, float32."""
    saved_modules: Sequence[str] = ()
    """Names of the modules that they belong to."""
    labels: Sequence[str] = ()
    """Classification: the class names, by class."""
    transposed: bool = False
    """Whether the adapted layers hold their weights as (in, out), as GPT-2's do."""
    parameters: int = 0
    """Of the base model."""
    manifest: bytes = b""
    """Every tensor of the base, as `directions.seed_ledger.Manifest` writes them."""
    anatomy: BlockLayout | None = None
    """Of the base's blocks; None for a model that cannot be pruned."""


MAX_EXAMPLES = 10**9
"""What a client states decides how many steps it is planned and how much it counts."""


@dataclass(frozen=True)
class ClientProfile:
    """What one client says of itself; an encoded one travels as header and bodies, as an assignment does."""

    client: str
    """Its lasting name."""
    num_examples: int
    foundation: ModelSpec
    methods: Sequence[str] = ()
    """Methods whose assignments the client understands."""
    device: Device = Device()
    held_out: int = 0
    """Rows that it trains nothing on, and scores global models on; 0 where it does not score, or does not say so."""


def encode_profile(profile: ClientProfile) -> EncodedAssignment:
    """Return a profile as header and bodies.

    Raises:
        WireError: if a tensor cannot travel.
    """
    common, device = profile.foundation, profile.device
    saved = encode_blob(common.saved)
    saved.header.role = "saved"
    header = pb.ClientProfile(
        client=profile.client,
        examples=profile.num_examples,
        base=common.base,
        modules=[
            pb.Module(name=name, out_features=m, in_features=n) for name, (m, n) in sorted(common.modules.items())
        ],
        saved=saved.header,
        saved_modules=common.saved_modules,
        labels=common.labels,
        transposed=common.transposed,
        parameters=common.parameters,
        verbs=[pb.ADAPT, pb.PROBE],
        methods=profile.methods,
        protocol=PROTOCOL,
        manifest=common.manifest,
        anatomy=None if common.anatomy is None else layout_to(common.anatomy),
        device=pb.Device(**vars(device)),  # of the same names; None leaves a field out
        held_out=profile.held_out,
    )
    return EncodedAssignment(header.SerializeToString(), {saved.digest: saved.body})


def decode_profile(header: bytes, blobs: Mapping[str, bytes]) -> ClientProfile:
    """Return the profile; its tensors are read-only views of the body.

    Raises:
        WireError: if the header is malformed, its body is missing or another, or the client speaks another protocol.
    """
    return _profile_from(header, lambda blob: decode_blob(blob, body_of(blob, blobs)))


def profile_outline(header: bytes) -> ClientProfile:
    """Return the profile of a header whose body is not here: tensors with names and shapes, and zeros for entries.

    Raises:
        WireError: if the header is malformed.
    """
    return _profile_from(header, outline_of)


def _profile_from(header: bytes, decode: Callable[[pb.Blob], Tensors]) -> ClientProfile:
    message = parse(pb.ClientProfile(), header)
    name = message.client
    if not 0 < len(name) <= MAX_NAME or not name.isprintable():
        raise WireError(f"profile: expected a printable name of 1 to {MAX_NAME} characters; got {name[:MAX_NAME]!r}")
    if message.protocol != PROTOCOL or pb.ADAPT not in message.verbs:
        raise WireError(
            f"{name}: expected protocol {PROTOCOL} and the verb ADAPT; got protocol {message.protocol}, "
            f"verbs {list(message.verbs)}; run the same release of fedtune on both sides"
        )
    names = [module.name for module in message.modules]
    # A client whose virtual tokens train adapts no module.
    trains = bool(names) or are_virtual(tensor.name for tensor in message.saved.tensors)
    if not trains or names != sorted(set(names)) or not all(names):
        raise WireError(f"{name}: expected modules, each once and in order; got {names[:5]}")
    modules = {module.name: (module.out_features, module.in_features) for module in message.modules}
    if not 1 <= message.examples <= MAX_EXAMPLES or message.held_out > MAX_EXAMPLES:
        raise WireError(
            f"{name}: expected 1 to {MAX_EXAMPLES:,} examples, and as many rows held out at most; "
            f"got {message.examples:,} and {message.held_out:,}"
        )
    if min(map(min, modules.values()), default=1) < 1:
        raise WireError(f"{name}: expected no empty module; got one")
    if (size := max(message.parameters, message.device.memory_bytes)) >= MAX_COUNT:
        raise WireError(f"{name}: expected parameters and bytes below {MAX_COUNT}; got {size}")
    check_manifest(name, message)
    device = Device(**{field.name: value for field, value in message.device.ListFields()})
    for key, seconds in (("s_per_tflop", device.s_per_tflop), ("s_per_mb", device.s_per_mb)):
        # Written so that NaN is refused too.
        if seconds is not None and not 0 < seconds <= LARGEST:
            raise WireError(f"{name}: expected {key} above 0 s, in float32; got {seconds}")
    saved = decode(message.saved)
    for key, array in saved.items():
        if array.dtype != np.float32 or not np.isfinite(array).all():
            raise WireError(f"{name}: expected finite float32 numbers in {key!r}; got {array.dtype.name}")
    return ClientProfile(
        client=name,
        num_examples=message.examples,
        foundation=ModelSpec(
            base=message.base,
            modules=modules,
            saved=saved,
            saved_modules=tuple(message.saved_modules),
            labels=tuple(message.labels),
            transposed=message.transposed,
            parameters=message.parameters,
            manifest=message.manifest,
            anatomy=layout_from(name, message.anatomy, modules) if message.HasField("anatomy") else None,
        ),
        methods=tuple(message.methods),
        device=device,
        held_out=message.held_out,
    )


def layout_to(anatomy: BlockLayout) -> pb.Anatomy:
    blocks = [
        pb.Block(prefix=b.prefix, heads=b.heads, kv_heads=b.kv_heads, head_dim=b.head_dim, channels=b.channels)
        for b in anatomy.blocks
    ]
    return pb.Anatomy(
        family=anatomy.family,
        width=anatomy.width,
        blocks=blocks,
        head=anatomy.head,
        outputs=anatomy.outputs,
        number_bytes=anatomy.number_bytes,
    )


WIDEST = 1 << 20
"""Heads, channels and width of a base are not above this."""


def layout_from(name: str, message: pb.Anatomy, modules: Mapping[str, tuple[int, int]]) -> BlockLayout:
    """Return the anatomy that a client states.

    Raises:
        WireError: if no base can be so, or it is not that of the layers which the client names.
    """
    blocks = tuple(Block(b.prefix, b.heads, b.kv_heads, b.head_dim, b.channels) for b in message.blocks)
    sizes = [(b.heads, b.kv_heads, b.head_dim, b.channels, message.width) for b in blocks]
    whole = blocks and all(min(size) > 0 and max(size) <= WIDEST for size in sizes)
    alone = len({b.prefix for b in blocks}) == len(blocks)
    if message.family not in FAMILIES or not whole or not alone or any(b.heads % b.kv_heads for b in blocks):
        raise WireError(
            f"{name}: expected an anatomy of {', '.join(FAMILIES)} with heads in equal groups; "
            f"got {message.family[:40]!r} of {len(blocks)} blocks"
        )
    anatomy = BlockLayout(
        message.family, blocks, message.width, message.head, message.outputs, max(1, message.number_bytes)
    )
    # Pruning slices by these shapes: a layer of another shape would be cut at the wrong rows.
    for layer, shape in zip(anatomy.sides, linear_shapes(anatomy), strict=True):
        if modules.get(layer, shape) != shape:
            raise WireError(f"{name}: {layer}: expected {shape}, as its anatomy says; got {modules[layer]}")
    return anatomy


def check_manifest(name: str, message: pb.ClientProfile) -> None:
    """Raise WireError unless the manifest, if one came, lists as many parameters as the client says there are."""
    # A base whose tensors cannot be listed can still be trained with adapters.
    if not message.manifest:
        return
    listed = decode_manifest(message.manifest)
    sizes = [entry.num_parameters for entry in listed.entries]
    # Directions are drawn by position in the manifest: one tensor more would shift all that follow.
    if sum(sizes) != message.parameters or 0 in sizes:
        raise WireError(
            f"{name}: expected a manifest of {message.parameters} parameters, no tensor empty; got {sum(sizes)}"
        )


def encode_terms(labels: Sequence[str]) -> bytes:
    """Return what goes to a client with a hello: the class names that it must use, if they are known."""
    return pb.Terms(labels=labels).SerializeToString()


def decode_terms(data: bytes) -> tuple[str, ...]:
    """Return the class names that a hello asks for; none: the client uses its own.

    Raises:
        WireError: if they are none, or one stands twice.
    """
    labels = tuple(parse(pb.Terms(), data).labels)
    if len(set(labels)) != len(labels) or len(labels) > MAX_LABELS:
        raise WireError(f"terms: expected at most {MAX_LABELS} class names, each once; got {len(labels)}")
    return labels


def fingerprint(foundation: ModelSpec) -> tuple[object, ...]:
    """Return a foundation as a value that can be compared and counted, tensors by their digest."""
    return (
        foundation.base,
        tuple(sorted(foundation.modules.items())),
        digest(foundation.saved),
        tuple(foundation.saved_modules),
        tuple(foundation.labels),
        foundation.transposed,
        foundation.parameters,
        foundation.manifest,
        foundation.anatomy,
    )


def difference(wanted: ModelSpec, found: ModelSpec) -> str:
    """Return in words in what a client's foundation differs from the run's; empty if it does not."""
    if wanted is found:  # as of clients that share it: then nothing needs to be hashed
        return ""
    if wanted.base != found.base:
        return (
            f"expected the base {wanted.base[:12]}; got {found.base[:12]}; "
            "load the same model in the same revision and dtype"
        )
    if are_virtual(wanted.saved) != are_virtual(found.saved):
        sides = ("virtual tokens" if are_virtual(each.saved) else "factors" for each in (wanted, found))
        return f"expected {next(sides)} to train; got {next(sides)}; set the same adapter.kind"
    if wanted.modules != found.modules:
        odd = sorted(dict(wanted.modules.items() ^ found.modules.items()))
        return (
            f"expected {len(wanted.modules)} adapted modules; got {len(found.modules)}, the first difference being "
            f"{odd[0]!r}; set the same adapter.targets"
        )
    if tuple(wanted.labels) != tuple(found.labels):
        names = f"{label_list(wanted.labels)}; got {label_list(found.labels)}"
        return f"expected the classes {names}; use the same label names"
    if tuple(wanted.saved_modules) != tuple(found.saved_modules):
        return (
            f"expected modules_to_save {list(wanted.saved_modules)}; got {list(found.saved_modules)}; "
            "set the same adapter.modules_to_save"
        )
    if digest(wanted.saved) != digest(found.saved):
        if are_virtual(wanted.saved):
            return "expected other first virtual tokens; set the same seed, adapter.kind and number of tokens"
        return "expected other initial values of modules_to_save; set the same seed"
    if fingerprint(wanted) != fingerprint(found):
        return "expected the layout of the run's base; got another; run the same release of fedtune and transformers"
    return ""


def label_list(labels: Sequence[str]) -> str:
    return f"{', '.join(labels[:5])}{', ...' * (len(labels) > 5)} ({len(labels)})" if labels else "none"
