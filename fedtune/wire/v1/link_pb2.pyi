from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    KIND_UNSET: _ClassVar[Kind]
    PLAN: _ClassVar[Kind]
    ORDER: _ClassVar[Kind]
    ANSWER: _ClassVar[Kind]
    DECLINE: _ClassVar[Kind]
    RECEIPT: _ClassVar[Kind]
    END: _ClassVar[Kind]
    SERVER: _ClassVar[Kind]

class Veto(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    VETO_UNSET: _ClassVar[Veto]
    METHOD_NOT_ALLOWED: _ClassVar[Veto]
    BASE_NOT_ALLOWED: _ClassVar[Veto]
    RANK_TOO_LARGE: _ClassVar[Veto]
    TOO_MANY_STEPS: _ClassVar[Veto]
    TOO_MANY_BYTES: _ClassVar[Veto]
    OUTSIDE_HOURS: _ClassVar[Veto]
    COHORT_TOO_SMALL: _ClassVar[Veto]
    TOO_MANY_ROUNDS: _ClassVar[Veto]
    RECIPE_NOT_ALLOWED: _ClassVar[Veto]
    TASK_UNKNOWN: _ClassVar[Veto]
    WORK_FAILED: _ClassVar[Veto]
    OPERATOR: _ClassVar[Veto]
    SCORES_NOT_ALLOWED: _ClassVar[Veto]
    VETO_RECIPE_DIFFERS: _ClassVar[Veto]
    COHORT_UNKNOWN: _ClassVar[Veto]
    TOO_FEW_EXAMPLES: _ClassVar[Veto]
    TOO_FEW_STEPS: _ClassVar[Veto]
    EMBEDDINGS_NOT_ALLOWED: _ClassVar[Veto]
    DEVICE_NOT_READY: _ClassVar[Veto]

class Verdict(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    VERDICT_UNSET: _ClassVar[Verdict]
    ACCEPTED: _ClassVar[Verdict]
    LATE: _ClassVar[Verdict]
    NOTED: _ClassVar[Verdict]
    REFUSED: _ClassVar[Verdict]

class Reason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REASON_UNSET: _ClassVar[Reason]
    NOT_IN_ROSTER: _ClassVar[Reason]
    REVOKED: _ClassVar[Reason]
    WRONG_ROLE: _ClassVar[Reason]
    SERIAL_UNKNOWN: _ClassVar[Reason]
    BARRED: _ClassVar[Reason]
    PROTOCOL: _ClassVar[Reason]
    WRONG_FEDERATION: _ClassVar[Reason]
    ROSTER_OLD: _ClassVar[Reason]
    STALE_EPOCH: _ClassVar[Reason]
    TOO_MANY_CALLS: _ClassVar[Reason]
    NAME_IN_USE: _ClassVar[Reason]
    SITE_DIFFERS: _ClassVar[Reason]
    CERTIFICATE_ENDED: _ClassVar[Reason]
    INVITATION_UNKNOWN: _ClassVar[Reason]
    INVITATION_ENDED: _ClassVar[Reason]
    INVITATION_USED: _ClassVar[Reason]
    REQUEST_DIFFERS: _ClassVar[Reason]
    REQUEST_REJECTED: _ClassVar[Reason]
    QUEUE_FULL: _ClassVar[Reason]
    HEADER_TOO_LARGE: _ClassVar[Reason]
    KEY_UNKNOWN: _ClassVar[Reason]
    SIGNATURE: _ClassVar[Reason]
    HEADER_MALFORMED: _ClassVar[Reason]
    AUTHOR_MISMATCH: _ClassVar[Reason]
    KIND_NOT_EXPECTED: _ClassVar[Reason]
    WRONG_RUN: _ClassVar[Reason]
    ORDER_UNKNOWN: _ClassVar[Reason]
    ROUND_DIFFERS: _ClassVar[Reason]
    RECIPE_DIFFERS: _ClassVar[Reason]
    BASE_DIFFERS: _ClassVar[Reason]
    STATE_DIFFERS: _ClassVar[Reason]
    CONFLICT: _ClassVar[Reason]
    PARTS: _ClassVar[Reason]
    BODY_SIZE: _ClassVar[Reason]
    BUILD_DIFFERS: _ClassVar[Reason]
    QUOTA: _ClassVar[Reason]
    DISK_LOW: _ClassVar[Reason]
    RENEWAL_OFF: _ClassVar[Reason]
    NOT_WANTED: _ClassVar[Reason]
    OFFSET: _ClassVar[Reason]
    LENGTH: _ClassVar[Reason]
    DIGEST: _ClassVar[Reason]
    STALLED: _ClassVar[Reason]
    BUSY: _ClassVar[Reason]
    MALFORMED: _ClassVar[Reason]
    WRONG_CLIENT: _ClassVar[Reason]
    WRONG_ROUND: _ClassVar[Reason]
    WRONG_BASE: _ClassVar[Reason]
    EXAMPLES_RANGE: _ClassVar[Reason]
    LOSS_RANGE: _ClassVar[Reason]
    TENSOR_NAMES: _ClassVar[Reason]
    TENSOR_SHAPE: _ClassVar[Reason]
    TENSOR_DTYPE: _ClassVar[Reason]
    RANK_RANGE: _ClassVar[Reason]
    NOT_FINITE: _ClassVar[Reason]
    NORM_OVER_CAP: _ClassVar[Reason]
    SCALARS: _ClassVar[Reason]
    SCALAR_RANGE: _ClassVar[Reason]
    STATE_REBUILT: _ClassVar[Reason]
    STRUCTURE: _ClassVar[Reason]
    SCORES: _ClassVar[Reason]
    NOT_AGGREGATED: _ClassVar[Reason]
KIND_UNSET: Kind
PLAN: Kind
ORDER: Kind
ANSWER: Kind
DECLINE: Kind
RECEIPT: Kind
END: Kind
SERVER: Kind
VETO_UNSET: Veto
METHOD_NOT_ALLOWED: Veto
BASE_NOT_ALLOWED: Veto
RANK_TOO_LARGE: Veto
TOO_MANY_STEPS: Veto
TOO_MANY_BYTES: Veto
OUTSIDE_HOURS: Veto
COHORT_TOO_SMALL: Veto
TOO_MANY_ROUNDS: Veto
RECIPE_NOT_ALLOWED: Veto
TASK_UNKNOWN: Veto
WORK_FAILED: Veto
OPERATOR: Veto
SCORES_NOT_ALLOWED: Veto
VETO_RECIPE_DIFFERS: Veto
COHORT_UNKNOWN: Veto
TOO_FEW_EXAMPLES: Veto
TOO_FEW_STEPS: Veto
EMBEDDINGS_NOT_ALLOWED: Veto
DEVICE_NOT_READY: Veto
VERDICT_UNSET: Verdict
ACCEPTED: Verdict
LATE: Verdict
NOTED: Verdict
REFUSED: Verdict
REASON_UNSET: Reason
NOT_IN_ROSTER: Reason
REVOKED: Reason
WRONG_ROLE: Reason
SERIAL_UNKNOWN: Reason
BARRED: Reason
PROTOCOL: Reason
WRONG_FEDERATION: Reason
ROSTER_OLD: Reason
STALE_EPOCH: Reason
TOO_MANY_CALLS: Reason
NAME_IN_USE: Reason
SITE_DIFFERS: Reason
CERTIFICATE_ENDED: Reason
INVITATION_UNKNOWN: Reason
INVITATION_ENDED: Reason
INVITATION_USED: Reason
REQUEST_DIFFERS: Reason
REQUEST_REJECTED: Reason
QUEUE_FULL: Reason
HEADER_TOO_LARGE: Reason
KEY_UNKNOWN: Reason
SIGNATURE: Reason
HEADER_MALFORMED: Reason
AUTHOR_MISMATCH: Reason
KIND_NOT_EXPECTED: Reason
WRONG_RUN: Reason
ORDER_UNKNOWN: Reason
ROUND_DIFFERS: Reason
RECIPE_DIFFERS: Reason
BASE_DIFFERS: Reason
STATE_DIFFERS: Reason
CONFLICT: Reason
PARTS: Reason
BODY_SIZE: Reason
BUILD_DIFFERS: Reason
QUOTA: Reason
DISK_LOW: Reason
RENEWAL_OFF: Reason
NOT_WANTED: Reason
OFFSET: Reason
LENGTH: Reason
DIGEST: Reason
STALLED: Reason
BUSY: Reason
MALFORMED: Reason
WRONG_CLIENT: Reason
WRONG_ROUND: Reason
WRONG_BASE: Reason
EXAMPLES_RANGE: Reason
LOSS_RANGE: Reason
TENSOR_NAMES: Reason
TENSOR_SHAPE: Reason
TENSOR_DTYPE: Reason
RANK_RANGE: Reason
NOT_FINITE: Reason
NORM_OVER_CAP: Reason
SCALARS: Reason
SCALAR_RANGE: Reason
STATE_REBUILT: Reason
STRUCTURE: Reason
SCORES: Reason
NOT_AGGREGATED: Reason

class Part(_message.Message):
    __slots__ = ("key", "digest", "num_bytes")
    KEY_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    key: str
    digest: bytes
    num_bytes: int
    def __init__(self, key: _Optional[str] = ..., digest: _Optional[bytes] = ..., num_bytes: _Optional[int] = ...) -> None: ...

class Decline(_message.Message):
    __slots__ = ("veto", "note")
    VETO_FIELD_NUMBER: _ClassVar[int]
    NOTE_FIELD_NUMBER: _ClassVar[int]
    veto: Veto
    note: str
    def __init__(self, veto: _Optional[_Union[Veto, str]] = ..., note: _Optional[str] = ...) -> None: ...

class Receipt(_message.Message):
    __slots__ = ("answer", "verdict", "refusal", "journal_records", "journal_head")
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    JOURNAL_RECORDS_FIELD_NUMBER: _ClassVar[int]
    JOURNAL_HEAD_FIELD_NUMBER: _ClassVar[int]
    answer: bytes
    verdict: Verdict
    refusal: Refusal
    journal_records: int
    journal_head: bytes
    def __init__(self, answer: _Optional[bytes] = ..., verdict: _Optional[_Union[Verdict, str]] = ..., refusal: _Optional[_Union[Refusal, _Mapping]] = ..., journal_records: _Optional[int] = ..., journal_head: _Optional[bytes] = ...) -> None: ...

class Header(_message.Message):
    __slots__ = ("protocol", "federation", "run", "author", "to", "kind", "task", "round", "recipe", "base", "state", "order", "parts", "cohort", "decline", "receipt", "build", "nonce", "epoch", "members")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    FEDERATION_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    AUTHOR_FIELD_NUMBER: _ClassVar[int]
    TO_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    RECIPE_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ORDER_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    COHORT_FIELD_NUMBER: _ClassVar[int]
    DECLINE_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    BUILD_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    federation: str
    run: str
    author: str
    to: str
    kind: Kind
    task: str
    round: int
    recipe: bytes
    base: bytes
    state: bytes
    order: bytes
    parts: _containers.RepeatedCompositeFieldContainer[Part]
    cohort: int
    decline: Decline
    receipt: Receipt
    build: str
    nonce: int
    epoch: int
    members: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, protocol: _Optional[int] = ..., federation: _Optional[str] = ..., run: _Optional[str] = ..., author: _Optional[str] = ..., to: _Optional[str] = ..., kind: _Optional[_Union[Kind, str]] = ..., task: _Optional[str] = ..., round: _Optional[int] = ..., recipe: _Optional[bytes] = ..., base: _Optional[bytes] = ..., state: _Optional[bytes] = ..., order: _Optional[bytes] = ..., parts: _Optional[_Iterable[_Union[Part, _Mapping]]] = ..., cohort: _Optional[int] = ..., decline: _Optional[_Union[Decline, _Mapping]] = ..., receipt: _Optional[_Union[Receipt, _Mapping]] = ..., build: _Optional[str] = ..., nonce: _Optional[int] = ..., epoch: _Optional[int] = ..., members: _Optional[_Iterable[str]] = ...) -> None: ...

class Envelope(_message.Message):
    __slots__ = ("header", "signature", "key_id")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    KEY_ID_FIELD_NUMBER: _ClassVar[int]
    header: bytes
    signature: bytes
    key_id: bytes
    def __init__(self, header: _Optional[bytes] = ..., signature: _Optional[bytes] = ..., key_id: _Optional[bytes] = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("reason", "field", "expected", "found", "passing")
    REASON_FIELD_NUMBER: _ClassVar[int]
    FIELD_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_FIELD_NUMBER: _ClassVar[int]
    FOUND_FIELD_NUMBER: _ClassVar[int]
    PASSING_FIELD_NUMBER: _ClassVar[int]
    reason: Reason
    field: str
    expected: str
    found: str
    passing: bool
    def __init__(self, reason: _Optional[_Union[Reason, str]] = ..., field: _Optional[str] = ..., expected: _Optional[str] = ..., found: _Optional[str] = ..., passing: bool = ...) -> None: ...

class HelloRequest(_message.Message):
    __slots__ = ("protocols", "federation", "build", "roster_version", "process", "nonce")
    PROTOCOLS_FIELD_NUMBER: _ClassVar[int]
    FEDERATION_FIELD_NUMBER: _ClassVar[int]
    BUILD_FIELD_NUMBER: _ClassVar[int]
    ROSTER_VERSION_FIELD_NUMBER: _ClassVar[int]
    PROCESS_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    protocols: _containers.RepeatedScalarFieldContainer[int]
    federation: str
    build: str
    roster_version: int
    process: int
    nonce: int
    def __init__(self, protocols: _Optional[_Iterable[int]] = ..., federation: _Optional[str] = ..., build: _Optional[str] = ..., roster_version: _Optional[int] = ..., process: _Optional[int] = ..., nonce: _Optional[int] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("part_bytes", "window_bytes", "inline_bytes", "hold_ms", "stall_ms")
    PART_BYTES_FIELD_NUMBER: _ClassVar[int]
    WINDOW_BYTES_FIELD_NUMBER: _ClassVar[int]
    INLINE_BYTES_FIELD_NUMBER: _ClassVar[int]
    HOLD_MS_FIELD_NUMBER: _ClassVar[int]
    STALL_MS_FIELD_NUMBER: _ClassVar[int]
    part_bytes: int
    window_bytes: int
    inline_bytes: int
    hold_ms: int
    stall_ms: int
    def __init__(self, part_bytes: _Optional[int] = ..., window_bytes: _Optional[int] = ..., inline_bytes: _Optional[int] = ..., hold_ms: _Optional[int] = ..., stall_ms: _Optional[int] = ...) -> None: ...

class HelloReply(_message.Message):
    __slots__ = ("protocol", "epoch", "limits", "plan", "recipe", "roster", "refusal", "roster_version", "proof", "certificate")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    RECIPE_FIELD_NUMBER: _ClassVar[int]
    ROSTER_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    ROSTER_VERSION_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    epoch: int
    limits: Limits
    plan: Envelope
    recipe: bytes
    roster: bytes
    refusal: Refusal
    roster_version: int
    proof: Envelope
    certificate: bytes
    def __init__(self, protocol: _Optional[int] = ..., epoch: _Optional[int] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., plan: _Optional[_Union[Envelope, _Mapping]] = ..., recipe: _Optional[bytes] = ..., roster: _Optional[bytes] = ..., refusal: _Optional[_Union[Refusal, _Mapping]] = ..., roster_version: _Optional[int] = ..., proof: _Optional[_Union[Envelope, _Mapping]] = ..., certificate: _Optional[bytes] = ...) -> None: ...

class NextRequest(_message.Message):
    __slots__ = ("epoch", "holding", "process", "roster_version", "progress", "dropped")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    HOLDING_FIELD_NUMBER: _ClassVar[int]
    PROCESS_FIELD_NUMBER: _ClassVar[int]
    ROSTER_VERSION_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    holding: _containers.RepeatedScalarFieldContainer[bytes]
    process: int
    roster_version: int
    progress: _containers.RepeatedCompositeFieldContainer[Progress]
    dropped: _containers.RepeatedCompositeFieldContainer[Dropped]
    def __init__(self, epoch: _Optional[int] = ..., holding: _Optional[_Iterable[bytes]] = ..., process: _Optional[int] = ..., roster_version: _Optional[int] = ..., progress: _Optional[_Iterable[_Union[Progress, _Mapping]]] = ..., dropped: _Optional[_Iterable[_Union[Dropped, _Mapping]]] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("order", "phase", "done", "total", "cpu_ms")
    class Phase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        PHASE_UNSET: _ClassVar[Progress.Phase]
        FETCHING: _ClassVar[Progress.Phase]
        WORKING: _ClassVar[Progress.Phase]
        SENDING: _ClassVar[Progress.Phase]
        WAITING: _ClassVar[Progress.Phase]
    PHASE_UNSET: Progress.Phase
    FETCHING: Progress.Phase
    WORKING: Progress.Phase
    SENDING: Progress.Phase
    WAITING: Progress.Phase
    ORDER_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    CPU_MS_FIELD_NUMBER: _ClassVar[int]
    order: bytes
    phase: Progress.Phase
    done: int
    total: int
    cpu_ms: int
    def __init__(self, order: _Optional[bytes] = ..., phase: _Optional[_Union[Progress.Phase, str]] = ..., done: _Optional[int] = ..., total: _Optional[int] = ..., cpu_ms: _Optional[int] = ...) -> None: ...

class Dropped(_message.Message):
    __slots__ = ("order", "reason")
    ORDER_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    order: bytes
    reason: Reason
    def __init__(self, order: _Optional[bytes] = ..., reason: _Optional[_Union[Reason, str]] = ...) -> None: ...

class NextReply(_message.Message):
    __slots__ = ("work", "withdrawn", "wait", "stop", "refusal", "roster_version")
    WORK_FIELD_NUMBER: _ClassVar[int]
    WITHDRAWN_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    ROSTER_VERSION_FIELD_NUMBER: _ClassVar[int]
    work: Work
    withdrawn: Withdrawn
    wait: Wait
    stop: Stop
    refusal: Refusal
    roster_version: int
    def __init__(self, work: _Optional[_Union[Work, _Mapping]] = ..., withdrawn: _Optional[_Union[Withdrawn, _Mapping]] = ..., wait: _Optional[_Union[Wait, _Mapping]] = ..., stop: _Optional[_Union[Stop, _Mapping]] = ..., refusal: _Optional[_Union[Refusal, _Mapping]] = ..., roster_version: _Optional[int] = ...) -> None: ...

class Inline(_message.Message):
    __slots__ = ("digest", "data")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    data: bytes
    def __init__(self, digest: _Optional[bytes] = ..., data: _Optional[bytes] = ...) -> None: ...

class Work(_message.Message):
    __slots__ = ("order", "inline", "left_ms")
    ORDER_FIELD_NUMBER: _ClassVar[int]
    INLINE_FIELD_NUMBER: _ClassVar[int]
    LEFT_MS_FIELD_NUMBER: _ClassVar[int]
    order: Envelope
    inline: _containers.RepeatedCompositeFieldContainer[Inline]
    left_ms: int
    def __init__(self, order: _Optional[_Union[Envelope, _Mapping]] = ..., inline: _Optional[_Iterable[_Union[Inline, _Mapping]]] = ..., left_ms: _Optional[int] = ...) -> None: ...

class Withdrawn(_message.Message):
    __slots__ = ("order",)
    ORDER_FIELD_NUMBER: _ClassVar[int]
    order: bytes
    def __init__(self, order: _Optional[bytes] = ...) -> None: ...

class Wait(_message.Message):
    __slots__ = ("retry_after_ms",)
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    retry_after_ms: int
    def __init__(self, retry_after_ms: _Optional[int] = ...) -> None: ...

class Stop(_message.Message):
    __slots__ = ("why", "retry_after_ms", "end")
    class Why(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        WHY_UNSET: _ClassVar[Stop.Why]
        FINISHED: _ClassVar[Stop.Why]
        DRAINING: _ClassVar[Stop.Why]
    WHY_UNSET: Stop.Why
    FINISHED: Stop.Why
    DRAINING: Stop.Why
    WHY_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    why: Stop.Why
    retry_after_ms: int
    end: Envelope
    def __init__(self, why: _Optional[_Union[Stop.Why, str]] = ..., retry_after_ms: _Optional[int] = ..., end: _Optional[_Union[Envelope, _Mapping]] = ...) -> None: ...

class FetchRequest(_message.Message):
    __slots__ = ("digest", "offset")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    offset: int
    def __init__(self, digest: _Optional[bytes] = ..., offset: _Optional[int] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("data", "refusal", "roster_version")
    DATA_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    ROSTER_VERSION_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    refusal: Refusal
    roster_version: int
    def __init__(self, data: _Optional[bytes] = ..., refusal: _Optional[_Union[Refusal, _Mapping]] = ..., roster_version: _Optional[int] = ...) -> None: ...

class SubmitRequest(_message.Message):
    __slots__ = ("envelope", "inline")
    ENVELOPE_FIELD_NUMBER: _ClassVar[int]
    INLINE_FIELD_NUMBER: _ClassVar[int]
    envelope: Envelope
    inline: _containers.RepeatedCompositeFieldContainer[Inline]
    def __init__(self, envelope: _Optional[_Union[Envelope, _Mapping]] = ..., inline: _Optional[_Iterable[_Union[Inline, _Mapping]]] = ...) -> None: ...

class Want(_message.Message):
    __slots__ = ("digest", "offset")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    offset: int
    def __init__(self, digest: _Optional[bytes] = ..., offset: _Optional[int] = ...) -> None: ...

class Wanted(_message.Message):
    __slots__ = ("parts",)
    PARTS_FIELD_NUMBER: _ClassVar[int]
    parts: _containers.RepeatedCompositeFieldContainer[Want]
    def __init__(self, parts: _Optional[_Iterable[_Union[Want, _Mapping]]] = ...) -> None: ...

class SubmitReply(_message.Message):
    __slots__ = ("receipt", "wanted", "refusal", "busy", "roster_version")
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    WANTED_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    BUSY_FIELD_NUMBER: _ClassVar[int]
    ROSTER_VERSION_FIELD_NUMBER: _ClassVar[int]
    receipt: Envelope
    wanted: Wanted
    refusal: Refusal
    busy: Wait
    roster_version: int
    def __init__(self, receipt: _Optional[_Union[Envelope, _Mapping]] = ..., wanted: _Optional[_Union[Wanted, _Mapping]] = ..., refusal: _Optional[_Union[Refusal, _Mapping]] = ..., busy: _Optional[_Union[Wait, _Mapping]] = ..., roster_version: _Optional[int] = ...) -> None: ...

class PushPart(_message.Message):
    __slots__ = ("answer", "digest", "offset", "data")
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    answer: bytes
    digest: bytes
    offset: int
    data: bytes
    def __init__(self, answer: _Optional[bytes] = ..., digest: _Optional[bytes] = ..., offset: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class PushAck(_message.Message):
    __slots__ = ("taken", "complete", "refusal", "roster_version")
    TAKEN_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    ROSTER_VERSION_FIELD_NUMBER: _ClassVar[int]
    taken: int
    complete: bool
    refusal: Refusal
    roster_version: int
    def __init__(self, taken: _Optional[int] = ..., complete: bool = ..., refusal: _Optional[_Union[Refusal, _Mapping]] = ..., roster_version: _Optional[int] = ...) -> None: ...

class EnrolRequest(_message.Message):
    __slots__ = ("invitation", "request", "signature")
    INVITATION_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    invitation: bytes
    request: bytes
    signature: bytes
    def __init__(self, invitation: _Optional[bytes] = ..., request: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class RenewRequest(_message.Message):
    __slots__ = ("request", "statement")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    STATEMENT_FIELD_NUMBER: _ClassVar[int]
    request: bytes
    statement: bytes
    def __init__(self, request: _Optional[bytes] = ..., statement: _Optional[bytes] = ...) -> None: ...

class EnrolReply(_message.Message):
    __slots__ = ("bundle", "pending", "refusal")
    BUNDLE_FIELD_NUMBER: _ClassVar[int]
    PENDING_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    bundle: bytes
    pending: Wait
    refusal: Refusal
    def __init__(self, bundle: _Optional[bytes] = ..., pending: _Optional[_Union[Wait, _Mapping]] = ..., refusal: _Optional[_Union[Refusal, _Mapping]] = ...) -> None: ...
