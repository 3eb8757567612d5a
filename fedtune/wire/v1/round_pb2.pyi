from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Verb(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    VERB_UNSET: _ClassVar[Verb]
    ADAPT: _ClassVar[Verb]
    PROBE: _ClassVar[Verb]
    SCORE: _ClassVar[Verb]
    DESCEND: _ClassVar[Verb]
    SUM: _ClassVar[Verb]

class DType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSET: _ClassVar[DType]
    F32: _ClassVar[DType]
    F16: _ClassVar[DType]
    BF16: _ClassVar[DType]
    I32: _ClassVar[DType]
    I16: _ClassVar[DType]
    I8: _ClassVar[DType]
    U8: _ClassVar[DType]
    U32: _ClassVar[DType]
    U64: _ClassVar[DType]
    I4: _ClassVar[DType]

class BaseFormat(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    BASE_AS_RECIPE: _ClassVar[BaseFormat]
    BASE_INT8: _ClassVar[BaseFormat]
    BASE_NF4: _ClassVar[BaseFormat]

class View(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    VIEW_WHOLE: _ClassVar[View]
    VIEW_DEPLOYED: _ClassVar[View]

class Importance(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    IMPORTANCE_NONE: _ClassVar[Importance]
    IMPORTANCE_GAIN: _ClassVar[Importance]
    IMPORTANCE_GRADIENT: _ClassVar[Importance]
    IMPORTANCE_SVD: _ClassVar[Importance]
    IMPORTANCE_ADALORA: _ClassVar[Importance]

class Train(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TRAIN_UNSET: _ClassVar[Train]
    TRAIN_AB: _ClassVar[Train]
    TRAIN_B: _ClassVar[Train]

class Upload(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    UPLOAD_UNSET: _ClassVar[Upload]
    UPLOAD_FACTORS: _ClassVar[Upload]
    UPLOAD_DIFFERENCE: _ClassVar[Upload]

class Bank(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    BANK_UNSET: _ClassVar[Bank]
    GAUSSIAN: _ClassVar[Bank]
    HADAMARD: _ClassVar[Bank]
    KRON: _ClassVar[Bank]

class SeedForm(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FORM_UNSET: _ClassVar[SeedForm]
    WHOLE: _ClassVar[SeedForm]
    CHANGED: _ClassVar[SeedForm]
    LOG: _ClassVar[SeedForm]

class Sampling(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    UNIFORM: _ClassVar[Sampling]
    DISTINCT: _ClassVar[Sampling]
    PRO: _ClassVar[Sampling]

class PersonalKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PERSONAL_UNSET: _ClassVar[PersonalKind]
    DITTO: _ClassVar[PersonalKind]
    PFEDME: _ClassVar[PersonalKind]
    FEDREP: _ClassVar[PersonalKind]
    SHARE_A: _ClassVar[PersonalKind]
    FEDBN: _ClassVar[PersonalKind]
    FINETUNE: _ClassVar[PersonalKind]
VERB_UNSET: Verb
ADAPT: Verb
PROBE: Verb
SCORE: Verb
DESCEND: Verb
SUM: Verb
DTYPE_UNSET: DType
F32: DType
F16: DType
BF16: DType
I32: DType
I16: DType
I8: DType
U8: DType
U32: DType
U64: DType
I4: DType
BASE_AS_RECIPE: BaseFormat
BASE_INT8: BaseFormat
BASE_NF4: BaseFormat
VIEW_WHOLE: View
VIEW_DEPLOYED: View
IMPORTANCE_NONE: Importance
IMPORTANCE_GAIN: Importance
IMPORTANCE_GRADIENT: Importance
IMPORTANCE_SVD: Importance
IMPORTANCE_ADALORA: Importance
TRAIN_UNSET: Train
TRAIN_AB: Train
TRAIN_B: Train
UPLOAD_UNSET: Upload
UPLOAD_FACTORS: Upload
UPLOAD_DIFFERENCE: Upload
BANK_UNSET: Bank
GAUSSIAN: Bank
HADAMARD: Bank
KRON: Bank
FORM_UNSET: SeedForm
WHOLE: SeedForm
CHANGED: SeedForm
LOG: SeedForm
UNIFORM: Sampling
DISTINCT: Sampling
PRO: Sampling
PERSONAL_UNSET: PersonalKind
DITTO: PersonalKind
PFEDME: PersonalKind
FEDREP: PersonalKind
SHARE_A: PersonalKind
FEDBN: PersonalKind
FINETUNE: PersonalKind

class TensorSpec(_message.Message):
    __slots__ = ("name", "dtype", "shape")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: DType
    shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[_Union[DType, str]] = ..., shape: _Optional[_Iterable[int]] = ...) -> None: ...

class Blob(_message.Message):
    __slots__ = ("role", "digest", "num_bytes", "tensors", "deflated")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    DEFLATED_FIELD_NUMBER: _ClassVar[int]
    role: str
    digest: bytes
    num_bytes: int
    tensors: _containers.RepeatedCompositeFieldContainer[TensorSpec]
    deflated: int
    def __init__(self, role: _Optional[str] = ..., digest: _Optional[bytes] = ..., num_bytes: _Optional[int] = ..., tensors: _Optional[_Iterable[_Union[TensorSpec, _Mapping]]] = ..., deflated: _Optional[int] = ...) -> None: ...

class Plan(_message.Message):
    __slots__ = ("rank", "pruning", "scale", "client", "base_dtype", "ranks", "back", "view", "importance")
    RANK_FIELD_NUMBER: _ClassVar[int]
    PRUNING_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    BASE_DTYPE_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    BACK_FIELD_NUMBER: _ClassVar[int]
    VIEW_FIELD_NUMBER: _ClassVar[int]
    IMPORTANCE_FIELD_NUMBER: _ClassVar[int]
    rank: int
    pruning: float
    scale: float
    client: str
    base_dtype: BaseFormat
    ranks: _containers.RepeatedScalarFieldContainer[int]
    back: float
    view: View
    importance: Importance
    def __init__(self, rank: _Optional[int] = ..., pruning: _Optional[float] = ..., scale: _Optional[float] = ..., client: _Optional[str] = ..., base_dtype: _Optional[_Union[BaseFormat, str]] = ..., ranks: _Optional[_Iterable[int]] = ..., back: _Optional[float] = ..., view: _Optional[_Union[View, str]] = ..., importance: _Optional[_Union[Importance, str]] = ...) -> None: ...

class LocalAdapter(_message.Message):
    __slots__ = ("a_key", "train", "upload", "wire_dtype", "rank_penalty", "rank_decay", "proximal", "preference_beta")
    A_KEY_FIELD_NUMBER: _ClassVar[int]
    TRAIN_FIELD_NUMBER: _ClassVar[int]
    UPLOAD_FIELD_NUMBER: _ClassVar[int]
    WIRE_DTYPE_FIELD_NUMBER: _ClassVar[int]
    RANK_PENALTY_FIELD_NUMBER: _ClassVar[int]
    RANK_DECAY_FIELD_NUMBER: _ClassVar[int]
    PROXIMAL_FIELD_NUMBER: _ClassVar[int]
    PREFERENCE_BETA_FIELD_NUMBER: _ClassVar[int]
    a_key: int
    train: Train
    upload: Upload
    wire_dtype: DType
    rank_penalty: float
    rank_decay: float
    proximal: float
    preference_beta: float
    def __init__(self, a_key: _Optional[int] = ..., train: _Optional[_Union[Train, str]] = ..., upload: _Optional[_Union[Upload, str]] = ..., wire_dtype: _Optional[_Union[DType, str]] = ..., rank_penalty: _Optional[float] = ..., rank_decay: _Optional[float] = ..., proximal: _Optional[float] = ..., preference_beta: _Optional[float] = ...) -> None: ...

class SeedState(_message.Message):
    __slots__ = ("form", "since", "data", "round", "digest")
    FORM_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    form: SeedForm
    since: int
    data: bytes
    round: int
    digest: bytes
    def __init__(self, form: _Optional[_Union[SeedForm, str]] = ..., since: _Optional[int] = ..., data: _Optional[bytes] = ..., round: _Optional[int] = ..., digest: _Optional[bytes] = ...) -> None: ...

class Probe(_message.Message):
    __slots__ = ("bank", "seeds", "key", "exponent", "shift", "perturbation", "state", "steps", "batch", "learning_rate", "sampling", "levels", "queries", "normalise", "clip", "trainable", "vectors", "embeddings", "calibrate", "groups", "by_tensor", "earlier", "curvatures")
    BANK_FIELD_NUMBER: _ClassVar[int]
    SEEDS_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    EXPONENT_FIELD_NUMBER: _ClassVar[int]
    SHIFT_FIELD_NUMBER: _ClassVar[int]
    PERTURBATION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    LEVELS_FIELD_NUMBER: _ClassVar[int]
    QUERIES_FIELD_NUMBER: _ClassVar[int]
    NORMALISE_FIELD_NUMBER: _ClassVar[int]
    CLIP_FIELD_NUMBER: _ClassVar[int]
    TRAINABLE_FIELD_NUMBER: _ClassVar[int]
    VECTORS_FIELD_NUMBER: _ClassVar[int]
    EMBEDDINGS_FIELD_NUMBER: _ClassVar[int]
    CALIBRATE_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    BY_TENSOR_FIELD_NUMBER: _ClassVar[int]
    EARLIER_FIELD_NUMBER: _ClassVar[int]
    CURVATURES_FIELD_NUMBER: _ClassVar[int]
    bank: Bank
    seeds: int
    key: int
    exponent: int
    shift: int
    perturbation: int
    state: SeedState
    steps: int
    batch: int
    learning_rate: float
    sampling: Sampling
    levels: bytes
    queries: int
    normalise: bool
    clip: float
    trainable: _containers.RepeatedScalarFieldContainer[str]
    vectors: bool
    embeddings: bool
    calibrate: bool
    groups: int
    by_tensor: bool
    earlier: _containers.RepeatedScalarFieldContainer[int]
    curvatures: bool
    def __init__(self, bank: _Optional[_Union[Bank, str]] = ..., seeds: _Optional[int] = ..., key: _Optional[int] = ..., exponent: _Optional[int] = ..., shift: _Optional[int] = ..., perturbation: _Optional[int] = ..., state: _Optional[_Union[SeedState, _Mapping]] = ..., steps: _Optional[int] = ..., batch: _Optional[int] = ..., learning_rate: _Optional[float] = ..., sampling: _Optional[_Union[Sampling, str]] = ..., levels: _Optional[bytes] = ..., queries: _Optional[int] = ..., normalise: bool = ..., clip: _Optional[float] = ..., trainable: _Optional[_Iterable[str]] = ..., vectors: bool = ..., embeddings: bool = ..., calibrate: bool = ..., groups: _Optional[int] = ..., by_tensor: bool = ..., earlier: _Optional[_Iterable[int]] = ..., curvatures: bool = ...) -> None: ...

class Descend(_message.Message):
    __slots__ = ("probe", "steps", "batch", "learning_rate", "accumulation", "count", "bits", "largest_shift")
    PROBE_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    ACCUMULATION_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    BITS_FIELD_NUMBER: _ClassVar[int]
    LARGEST_SHIFT_FIELD_NUMBER: _ClassVar[int]
    probe: Probe
    steps: int
    batch: int
    learning_rate: float
    accumulation: int
    count: int
    bits: int
    largest_shift: int
    def __init__(self, probe: _Optional[_Union[Probe, _Mapping]] = ..., steps: _Optional[int] = ..., batch: _Optional[int] = ..., learning_rate: _Optional[float] = ..., accumulation: _Optional[int] = ..., count: _Optional[int] = ..., bits: _Optional[int] = ..., largest_shift: _Optional[int] = ...) -> None: ...

class Sum(_message.Message):
    __slots__ = ("batch", "fraction_bits")
    BATCH_FIELD_NUMBER: _ClassVar[int]
    FRACTION_BITS_FIELD_NUMBER: _ClassVar[int]
    batch: int
    fraction_bits: int
    def __init__(self, batch: _Optional[int] = ..., fraction_bits: _Optional[int] = ...) -> None: ...

class Surgery(_message.Message):
    __slots__ = ("settings", "stages", "before", "wanted", "moments", "whole")
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    BEFORE_FIELD_NUMBER: _ClassVar[int]
    WANTED_FIELD_NUMBER: _ClassVar[int]
    MOMENTS_FIELD_NUMBER: _ClassVar[int]
    WHOLE_FIELD_NUMBER: _ClassVar[int]
    settings: bytes
    stages: _containers.RepeatedScalarFieldContainer[bytes]
    before: bytes
    wanted: bool
    moments: bool
    whole: bool
    def __init__(self, settings: _Optional[bytes] = ..., stages: _Optional[_Iterable[bytes]] = ..., before: _Optional[bytes] = ..., wanted: bool = ..., moments: bool = ..., whole: bool = ...) -> None: ...

class Personal(_message.Message):
    __slots__ = ("kind", "keep", "strength", "rate", "steps")
    KIND_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    STRENGTH_FIELD_NUMBER: _ClassVar[int]
    RATE_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    kind: PersonalKind
    keep: _containers.RepeatedScalarFieldContainer[str]
    strength: float
    rate: float
    steps: int
    def __init__(self, kind: _Optional[_Union[PersonalKind, str]] = ..., keep: _Optional[_Iterable[str]] = ..., strength: _Optional[float] = ..., rate: _Optional[float] = ..., steps: _Optional[int] = ...) -> None: ...

class Score(_message.Message):
    __slots__ = ("examples", "batch", "ledger", "trainable", "preference_beta", "settings", "scale", "train", "seed")
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    LEDGER_FIELD_NUMBER: _ClassVar[int]
    TRAINABLE_FIELD_NUMBER: _ClassVar[int]
    PREFERENCE_BETA_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    TRAIN_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    examples: int
    batch: int
    ledger: bytes
    trainable: _containers.RepeatedScalarFieldContainer[int]
    preference_beta: float
    settings: bytes
    scale: float
    train: Train
    seed: int
    def __init__(self, examples: _Optional[int] = ..., batch: _Optional[int] = ..., ledger: _Optional[bytes] = ..., trainable: _Optional[_Iterable[int]] = ..., preference_beta: _Optional[float] = ..., settings: _Optional[bytes] = ..., scale: _Optional[float] = ..., train: _Optional[_Union[Train, str]] = ..., seed: _Optional[int] = ...) -> None: ...

class Assignment(_message.Message):
    __slots__ = ("verb", "method", "plan", "seed", "settings", "down", "local", "round", "base", "probe", "surgery", "labels", "date", "descend", "sum", "personal", "score")
    VERB_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    DOWN_FIELD_NUMBER: _ClassVar[int]
    LOCAL_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    PROBE_FIELD_NUMBER: _ClassVar[int]
    SURGERY_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    DATE_FIELD_NUMBER: _ClassVar[int]
    DESCEND_FIELD_NUMBER: _ClassVar[int]
    SUM_FIELD_NUMBER: _ClassVar[int]
    PERSONAL_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    verb: Verb
    method: str
    plan: Plan
    seed: int
    settings: bytes
    down: _containers.RepeatedCompositeFieldContainer[Blob]
    local: LocalAdapter
    round: int
    base: str
    probe: Probe
    surgery: Surgery
    labels: _containers.RepeatedScalarFieldContainer[str]
    date: str
    descend: Descend
    sum: Sum
    personal: Personal
    score: Score
    def __init__(self, verb: _Optional[_Union[Verb, str]] = ..., method: _Optional[str] = ..., plan: _Optional[_Union[Plan, _Mapping]] = ..., seed: _Optional[int] = ..., settings: _Optional[bytes] = ..., down: _Optional[_Iterable[_Union[Blob, _Mapping]]] = ..., local: _Optional[_Union[LocalAdapter, _Mapping]] = ..., round: _Optional[int] = ..., base: _Optional[str] = ..., probe: _Optional[_Union[Probe, _Mapping]] = ..., surgery: _Optional[_Union[Surgery, _Mapping]] = ..., labels: _Optional[_Iterable[str]] = ..., date: _Optional[str] = ..., descend: _Optional[_Union[Descend, _Mapping]] = ..., sum: _Optional[_Union[Sum, _Mapping]] = ..., personal: _Optional[_Union[Personal, _Mapping]] = ..., score: _Optional[_Union[Score, _Mapping]] = ...) -> None: ...

class Measured(_message.Message):
    __slots__ = ("seconds", "peak_bytes", "loss_before", "loss_after", "tokens", "importance", "side_tokens", "skipped_steps", "whole_loss_before", "whole_loss_after", "module_importance", "joules")
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    PEAK_BYTES_FIELD_NUMBER: _ClassVar[int]
    LOSS_BEFORE_FIELD_NUMBER: _ClassVar[int]
    LOSS_AFTER_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    IMPORTANCE_FIELD_NUMBER: _ClassVar[int]
    SIDE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SKIPPED_STEPS_FIELD_NUMBER: _ClassVar[int]
    WHOLE_LOSS_BEFORE_FIELD_NUMBER: _ClassVar[int]
    WHOLE_LOSS_AFTER_FIELD_NUMBER: _ClassVar[int]
    MODULE_IMPORTANCE_FIELD_NUMBER: _ClassVar[int]
    JOULES_FIELD_NUMBER: _ClassVar[int]
    seconds: float
    peak_bytes: int
    loss_before: float
    loss_after: float
    tokens: int
    importance: float
    side_tokens: int
    skipped_steps: int
    whole_loss_before: float
    whole_loss_after: float
    module_importance: _containers.RepeatedScalarFieldContainer[float]
    joules: float
    def __init__(self, seconds: _Optional[float] = ..., peak_bytes: _Optional[int] = ..., loss_before: _Optional[float] = ..., loss_after: _Optional[float] = ..., tokens: _Optional[int] = ..., importance: _Optional[float] = ..., side_tokens: _Optional[int] = ..., skipped_steps: _Optional[int] = ..., whole_loss_before: _Optional[float] = ..., whole_loss_after: _Optional[float] = ..., module_importance: _Optional[_Iterable[float]] = ..., joules: _Optional[float] = ...) -> None: ...

class ClientUpdate(_message.Message):
    __slots__ = ("examples", "measured", "client", "round", "base", "parts", "deflated_parts", "kept", "mask", "base_format", "codes", "personal_before", "personal_after")
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    MEASURED_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    DEFLATED_PARTS_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    MASK_FIELD_NUMBER: _ClassVar[int]
    BASE_FORMAT_FIELD_NUMBER: _ClassVar[int]
    CODES_FIELD_NUMBER: _ClassVar[int]
    PERSONAL_BEFORE_FIELD_NUMBER: _ClassVar[int]
    PERSONAL_AFTER_FIELD_NUMBER: _ClassVar[int]
    examples: int
    measured: Measured
    client: str
    round: int
    base: str
    parts: _containers.RepeatedCompositeFieldContainer[Blob]
    deflated_parts: bytes
    kept: bytes
    mask: bytes
    base_format: BaseFormat
    codes: bytes
    personal_before: bytes
    personal_after: bytes
    def __init__(self, examples: _Optional[int] = ..., measured: _Optional[_Union[Measured, _Mapping]] = ..., client: _Optional[str] = ..., round: _Optional[int] = ..., base: _Optional[str] = ..., parts: _Optional[_Iterable[_Union[Blob, _Mapping]]] = ..., deflated_parts: _Optional[bytes] = ..., kept: _Optional[bytes] = ..., mask: _Optional[bytes] = ..., base_format: _Optional[_Union[BaseFormat, str]] = ..., codes: _Optional[bytes] = ..., personal_before: _Optional[bytes] = ..., personal_after: _Optional[bytes] = ...) -> None: ...

class ProbeUpdate(_message.Message):
    __slots__ = ("scalars", "state", "checks", "round", "examples", "skipped", "seconds", "peak_mib", "tokens", "loss_before", "loss_after", "rms", "lost", "joules", "numbers", "shift", "bits", "count", "slopes", "curvatures")
    SCALARS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    CHECKS_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    SKIPPED_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    PEAK_MIB_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOSS_BEFORE_FIELD_NUMBER: _ClassVar[int]
    LOSS_AFTER_FIELD_NUMBER: _ClassVar[int]
    RMS_FIELD_NUMBER: _ClassVar[int]
    LOST_FIELD_NUMBER: _ClassVar[int]
    JOULES_FIELD_NUMBER: _ClassVar[int]
    NUMBERS_FIELD_NUMBER: _ClassVar[int]
    SHIFT_FIELD_NUMBER: _ClassVar[int]
    BITS_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    SLOPES_FIELD_NUMBER: _ClassVar[int]
    CURVATURES_FIELD_NUMBER: _ClassVar[int]
    scalars: bytes
    state: bytes
    checks: bytes
    round: int
    examples: int
    skipped: int
    seconds: float
    peak_mib: int
    tokens: int
    loss_before: float
    loss_after: float
    rms: float
    lost: bool
    joules: float
    numbers: bytes
    shift: int
    bits: int
    count: int
    slopes: _containers.RepeatedScalarFieldContainer[float]
    curvatures: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, scalars: _Optional[bytes] = ..., state: _Optional[bytes] = ..., checks: _Optional[bytes] = ..., round: _Optional[int] = ..., examples: _Optional[int] = ..., skipped: _Optional[int] = ..., seconds: _Optional[float] = ..., peak_mib: _Optional[int] = ..., tokens: _Optional[int] = ..., loss_before: _Optional[float] = ..., loss_after: _Optional[float] = ..., rms: _Optional[float] = ..., lost: bool = ..., joules: _Optional[float] = ..., numbers: _Optional[bytes] = ..., shift: _Optional[int] = ..., bits: _Optional[int] = ..., count: _Optional[int] = ..., slopes: _Optional[_Iterable[float]] = ..., curvatures: _Optional[_Iterable[float]] = ...) -> None: ...

class SumUpdate(_message.Message):
    __slots__ = ("round", "base", "counts", "sums", "squares", "seconds", "peak_mib", "tokens", "joules")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    SUMS_FIELD_NUMBER: _ClassVar[int]
    SQUARES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    PEAK_MIB_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    JOULES_FIELD_NUMBER: _ClassVar[int]
    round: int
    base: str
    counts: _containers.RepeatedScalarFieldContainer[int]
    sums: _containers.RepeatedScalarFieldContainer[int]
    squares: _containers.RepeatedScalarFieldContainer[int]
    seconds: float
    peak_mib: int
    tokens: int
    joules: float
    def __init__(self, round: _Optional[int] = ..., base: _Optional[str] = ..., counts: _Optional[_Iterable[int]] = ..., sums: _Optional[_Iterable[int]] = ..., squares: _Optional[_Iterable[int]] = ..., seconds: _Optional[float] = ..., peak_mib: _Optional[int] = ..., tokens: _Optional[int] = ..., joules: _Optional[float] = ...) -> None: ...

class ScoreUpdate(_message.Message):
    __slots__ = ("client", "round", "base", "metrics", "seconds", "personal")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class PersonalEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    PERSONAL_FIELD_NUMBER: _ClassVar[int]
    client: str
    round: int
    base: str
    metrics: _containers.ScalarMap[str, float]
    seconds: float
    personal: _containers.ScalarMap[str, float]
    def __init__(self, client: _Optional[str] = ..., round: _Optional[int] = ..., base: _Optional[str] = ..., metrics: _Optional[_Mapping[str, float]] = ..., seconds: _Optional[float] = ..., personal: _Optional[_Mapping[str, float]] = ...) -> None: ...

class Terms(_message.Message):
    __slots__ = ("labels",)
    LABELS_FIELD_NUMBER: _ClassVar[int]
    labels: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, labels: _Optional[_Iterable[str]] = ...) -> None: ...

class Module(_message.Message):
    __slots__ = ("name", "out_features", "in_features")
    NAME_FIELD_NUMBER: _ClassVar[int]
    OUT_FEATURES_FIELD_NUMBER: _ClassVar[int]
    IN_FEATURES_FIELD_NUMBER: _ClassVar[int]
    name: str
    out_features: int
    in_features: int
    def __init__(self, name: _Optional[str] = ..., out_features: _Optional[int] = ..., in_features: _Optional[int] = ...) -> None: ...

class Block(_message.Message):
    __slots__ = ("prefix", "heads", "kv_heads", "head_dim", "channels")
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    HEADS_FIELD_NUMBER: _ClassVar[int]
    KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    CHANNELS_FIELD_NUMBER: _ClassVar[int]
    prefix: str
    heads: int
    kv_heads: int
    head_dim: int
    channels: int
    def __init__(self, prefix: _Optional[str] = ..., heads: _Optional[int] = ..., kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., channels: _Optional[int] = ...) -> None: ...

class Anatomy(_message.Message):
    __slots__ = ("family", "width", "blocks", "head", "outputs", "number_bytes")
    FAMILY_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    NUMBER_BYTES_FIELD_NUMBER: _ClassVar[int]
    family: str
    width: int
    blocks: _containers.RepeatedCompositeFieldContainer[Block]
    head: int
    outputs: int
    number_bytes: int
    def __init__(self, family: _Optional[str] = ..., width: _Optional[int] = ..., blocks: _Optional[_Iterable[_Union[Block, _Mapping]]] = ..., head: _Optional[int] = ..., outputs: _Optional[int] = ..., number_bytes: _Optional[int] = ...) -> None: ...

class Device(_message.Message):
    __slots__ = ("memory_bytes", "cores", "accelerator", "s_per_tflop", "s_per_mb")
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    CORES_FIELD_NUMBER: _ClassVar[int]
    ACCELERATOR_FIELD_NUMBER: _ClassVar[int]
    S_PER_TFLOP_FIELD_NUMBER: _ClassVar[int]
    S_PER_MB_FIELD_NUMBER: _ClassVar[int]
    memory_bytes: int
    cores: int
    accelerator: str
    s_per_tflop: float
    s_per_mb: float
    def __init__(self, memory_bytes: _Optional[int] = ..., cores: _Optional[int] = ..., accelerator: _Optional[str] = ..., s_per_tflop: _Optional[float] = ..., s_per_mb: _Optional[float] = ...) -> None: ...

class ClientProfile(_message.Message):
    __slots__ = ("client", "examples", "base", "modules", "saved", "saved_modules", "labels", "transposed", "parameters", "verbs", "methods", "protocol", "device", "anatomy", "manifest", "held_out")
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    MODULES_FIELD_NUMBER: _ClassVar[int]
    SAVED_FIELD_NUMBER: _ClassVar[int]
    SAVED_MODULES_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    TRANSPOSED_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    VERBS_FIELD_NUMBER: _ClassVar[int]
    METHODS_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    ANATOMY_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    HELD_OUT_FIELD_NUMBER: _ClassVar[int]
    client: str
    examples: int
    base: str
    modules: _containers.RepeatedCompositeFieldContainer[Module]
    saved: Blob
    saved_modules: _containers.RepeatedScalarFieldContainer[str]
    labels: _containers.RepeatedScalarFieldContainer[str]
    transposed: bool
    parameters: int
    verbs: _containers.RepeatedScalarFieldContainer[Verb]
    methods: _containers.RepeatedScalarFieldContainer[str]
    protocol: int
    device: Device
    anatomy: Anatomy
    manifest: bytes
    held_out: int
    def __init__(self, client: _Optional[str] = ..., examples: _Optional[int] = ..., base: _Optional[str] = ..., modules: _Optional[_Iterable[_Union[Module, _Mapping]]] = ..., saved: _Optional[_Union[Blob, _Mapping]] = ..., saved_modules: _Optional[_Iterable[str]] = ..., labels: _Optional[_Iterable[str]] = ..., transposed: bool = ..., parameters: _Optional[int] = ..., verbs: _Optional[_Iterable[_Union[Verb, str]]] = ..., methods: _Optional[_Iterable[str]] = ..., protocol: _Optional[int] = ..., device: _Optional[_Union[Device, _Mapping]] = ..., anatomy: _Optional[_Union[Anatomy, _Mapping]] = ..., manifest: _Optional[bytes] = ..., held_out: _Optional[int] = ...) -> None: ...
