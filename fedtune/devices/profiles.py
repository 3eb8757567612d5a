"""Profiles of devices, each number with where it comes from, and fleets of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from math import exp, isfinite
from typing import Literal, TypeAlias

from fedtune.errors import ConfigError, Fault
from fedtune.seeds import derive, generator

Provenance: TypeAlias = Literal["datasheet", "measured", "published", "assumed", "recipe"]
"""published: by others, who measured it; recipe: a number that the recipe sets in a table `device`."""


@dataclass(frozen=True)
class DeviceProfile:
    """One kind of device; its rates are means, which traces move up and down."""

    name: str
    memory_gb: float
    """Memory that a model may use: main memory less what the system takes."""
    peak_tflops: float
    """Most operations that the device computes per second, in 10^12."""
    utilisation: float
    """Share of the peak that training reaches."""
    memory_gbps: float
    """Bandwidth of the device's memory."""
    up_mbps: float = 10.0
    """Mean bandwidth to the server."""
    down_mbps: float = 10.0
    """Mean bandwidth from the server."""
    net_sigma: float = 0.5
    """How much mean bandwidth differs between devices: standard deviation of its logarithm; 0 for none."""
    latency_s: float = 0.05
    """Time that a message needs one way, beside its transfer."""
    overhead_s: float = 0.5
    """Time that every round costs the device beside training and transfer: setting up, loading, tearing down."""
    modes: tuple[float, ...] = (1.0, 0.7, 0.5, 0.35)
    """Shares of its top speed that the device runs at; one is drawn for each period."""
    mode_period_s: float = 1200.0
    """How long a drawn share of the speed lasts."""
    availability: float = 1.0
    """Share of the time in which the device can be asked."""
    compute_w: float | None = None
    """Power while it works, at any speed; none with the two below: not known, and the run records no joules."""
    send_w: float | None = None
    """Power while it sends."""
    receive_w: float | None = None
    """Power while it receives."""
    provenance: Mapping[str, Provenance] = field(default_factory=dict)
    """By field; what is not named is assumed."""

    @property
    def tflops(self) -> float:
        """Operations that training gets, 1e12 per second, in the fastest mode."""
        return self.peak_tflops * self.utilisation

    @property
    def mean_mode(self) -> float:
        return sum(self.modes) / len(self.modes)

    def joules(self, *, work_s: float, down_s: float, up_s: float) -> float | None:
        """Return the energy of so many seconds of each; None for a device whose power is not known."""
        if self.compute_w is None or self.send_w is None or self.receive_w is None:
            return None
        return self.compute_w * work_s + self.receive_w * down_s + self.send_w * up_s

    def as_table(self) -> Mapping[str, Mapping[str, str]]:
        """Return every number that is known with where it comes from, as a report prints it."""
        table = {}
        for number in fields(self):
            value = getattr(self, number.name)
            if number.name not in ("name", "provenance") and value is not None:
                text = ", ".join(f"{part:g}" for part in value) if isinstance(value, tuple) else f"{value:.4g}"
                table[number.name] = {"value": text, "provenance": self.provenance.get(number.name, "assumed")}
        return table


LEAST = {"up_mbps": 0.01, "down_mbps": 0.01, "mode_period_s": 1.0}
"""Below these a transfer would be integrated over millions of pieces."""
POWERS = ("compute_w", "send_w", "receive_w")


def check(profile: DeviceProfile) -> DeviceProfile:
    """Return the profile if all of its numbers are possible.

    Raises:
        ConfigError: with every impossible number, and an example of a possible one.
    """
    faults = []
    where = f"device {profile.name}"

    def wrong(name: str, expected: str, got: object, hint: str) -> None:
        faults.append(Fault(f"{where}.{name}", expected, f"{got!r}", hint))

    for name in ("memory_gb", "peak_tflops", "memory_gbps"):
        value = getattr(profile, name)
        if not (isfinite(value) and value > 0):
            wrong(name, "a finite number above 0", value, f"e.g. {getattr(PROFILES['tx2'], name):g}, a TX2's")
    for name, least in LEAST.items():
        value = getattr(profile, name)
        if not (isfinite(value) and value >= least):
            expected = f"a finite number of at least {least:g}"
            wrong(name, expected, value, f"e.g. {getattr(PROFILES['tx2'], name):g}, a TX2's")
    for name in ("net_sigma", "latency_s", "overhead_s"):
        value = getattr(profile, name)
        if not (isfinite(value) and value >= 0):
            wrong(name, "a finite number of at least 0", value, "0 leaves it out")
    if not 0 < profile.utilisation <= 1:
        wrong("utilisation", "a share above 0, at most 1", profile.utilisation, "1 reaches the peak")
    if not 0 <= profile.availability <= 1:
        wrong("availability", "a share from 0 to 1", profile.availability, "1 is always there")
    if not profile.modes or not all(0 < mode <= 1 for mode in profile.modes):
        wrong("modes", "at least one share of the speed above 0, none above 1", profile.modes, "[1.0] never slows down")
    powers = {name: getattr(profile, name) for name in POWERS}
    for name, value in powers.items():
        if value is not None and not (isfinite(value) and value > 0):
            wrong(name, "a finite number above 0", value, f"e.g. {getattr(PROFILES['phone-mid'], name):g}, a phone's")
    if None in powers.values() and any(value is not None for value in powers.values()):
        absent = next(name for name, value in powers.items() if value is None)
        wrong(
            absent, f"all of {', '.join(POWERS)}, or none", None, "joules of a part would pass for those of the whole"
        )
    strange = sorted(set(profile.provenance) - {each.name for each in fields(DeviceProfile)})
    if strange:
        wrong("provenance", "names of fields", strange[0], "leave it out")
    if faults:
        raise ConfigError(faults)
    return profile


def jetson(
    name: str, *, memory_gb: float, peak: float, utilisation: float, bandwidth: float, **more: Provenance
) -> DeviceProfile:
    """Return a profile whose RAM bandwidth is of the datasheet; what is not said is assumed."""
    return DeviceProfile(
        name,
        memory_gb=memory_gb,
        peak_tflops=peak,
        utilisation=utilisation,
        memory_gbps=bandwidth,
        provenance={"memory_gbps": "datasheet", **more},
    )


def phone(
    name: str, *, memory_gb: float, rate: float, bandwidth: float, compute_w: float, **more: Provenance
) -> DeviceProfile:
    """Return a profile of a phone over Wi-Fi; what is not said is assumed.

    Its power while it works is what Arouj and Abdelmoniem 2022, arXiv 2208.04505 (EAFL) take for three classes of
    phones, of the whole device under a graphics benchmark. Sending and receiving: Huang et al. 2012, MobiSys, table 4,
    Wi-Fi: 132.86 mW and per Mb/s 283.17 mW up and 137.01 mW down, here at 10 Mb/s.
    """
    return DeviceProfile(
        name,
        memory_gb=memory_gb,
        peak_tflops=rate,
        utilisation=1.0,
        memory_gbps=bandwidth,
        overhead_s=2.0,
        compute_w=compute_w,
        send_w=2.96,
        receive_w=1.50,
        provenance={"compute_w": "published", "send_w": "published", "receive_w": "published", **more},
    )


PROFILES: Mapping[str, DeviceProfile] = {
    profile.name: profile
    for profile in (
        # Usable memory without a source: 65 % of 4 and 8 GB, 85 % above. Int8 TOPS are no training throughput: where
        # the datasheet names no other, the peak is set so that peak x utilisation is the assumed training rate.
        jetson("nano", memory_gb=2.6, peak=0.472, utilisation=0.09 / 0.472, bandwidth=25.6, peak_tflops="datasheet"),
        jetson("tx2", memory_gb=5.2, peak=1.33, utilisation=0.27 / 1.33, bandwidth=59.7, peak_tflops="datasheet"),
        jetson("xavier-nx", memory_gb=5.2, peak=1.69, utilisation=1.0 / 1.69, bandwidth=59.7),
        jetson("agx-xavier", memory_gb=27.2, peak=10.0, utilisation=0.4, bandwidth=136.5),
        jetson("orin-nano-8", memory_gb=5.2, peak=10.0, utilisation=0.3, bandwidth=68.0, peak_tflops="datasheet"),
        jetson("orin-nx-16", memory_gb=13.6, peak=16.0, utilisation=5.0 / 16.0, bandwidth=102.4),
        jetson("agx-orin-64", memory_gb=54.4, peak=42.5, utilisation=0.2, bandwidth=205.0),
        # A Snapdragon 778G with 7.5 GB trains a step of Gemma 3 270M (8 rows of 64 tokens, 0.55 TFLOP) in 170 s, as the
        # code of EdgeFlowerTune (arXiv 2605.08636) reports: 65 % of its memory, and its speed. The others are twice as
        # fast and half as fast.
        phone("phone-low", memory_gb=2.0, rate=0.0016, bandwidth=14.9, compute_w=2.98),
        phone("phone-mid", memory_gb=4.9, rate=0.0032, bandwidth=25.6, compute_w=5.44, peak_tflops="published"),
        phone("phone-high", memory_gb=7.8, rate=0.0064, bandwidth=51.2, compute_w=6.33),
    )
}
"""By name."""

SHARES: Mapping[str, Mapping[str, int]] = {
    "fedspine80": {"tx2": 30, "xavier-nx": 40, "agx-xavier": 10},
    "orin8": {"orin-nano-8": 4, "orin-nx-16": 2, "agx-orin-64": 2},
    "phones": {"phone-low": 4, "phone-mid": 4, "phone-high": 2},
}
"""Devices of a fleet by kind."""


def mixed_fleet(shares: Mapping[str, int]) -> Callable[[Sequence[str], int], Mapping[str, DeviceProfile]]:
    """Return the function that gives each client a device, in these proportions and in an order drawn by the seed."""

    def fleet(clients: Sequence[str], seed: int) -> Mapping[str, DeviceProfile]:
        names, total, kinds = sorted(clients), sum(shares.values()), list(shares)
        # Largest remainders: the counts add up, and are exact where the fleet has its own size.
        exact = [len(names) * share / total for share in shares.values()]
        counts = [int(part) for part in exact]
        rest = sorted(range(len(kinds)), key=lambda place: (counts[place] - exact[place], place))
        for place in rest[: len(names) - sum(counts)]:
            counts[place] += 1
        dealt = [kind for kind, count in zip(kinds, counts, strict=True) for _ in range(count)]
        # Shuffled: by name alone, the first clients would all have the first kind.
        order = generator(derive(seed, "fleet")).permutation(len(names)).tolist()
        return {name: PROFILES[dealt[place]] for name, place in zip(names, order, strict=True)}

    return fleet


def lognormal_fleet(clients: Sequence[str], seed: int) -> Mapping[str, DeviceProfile]:
    """Return devices as FedScale (Apache-2.0) draws them: seconds per sample .005 LogNormal(1, .6), all assumed.

    A sample is taken as 0.05 TFLOP, so that the median device trains at 3.7 TFLOP/s.
    """
    devices = {}
    for name in sorted(clients):
        rng = generator(derive(seed, "fleet", client=name))
        seconds = 0.005 * exp(1.0 + 0.6 * float(rng.standard_normal()))
        memory = min(64.0, max(2.0, 8.0 * exp(0.5 * float(rng.standard_normal()))))
        bandwidth = 10.0 * exp(0.5 * float(rng.standard_normal()))
        devices[name] = DeviceProfile(
            f"lognormal-{name}",
            memory_gb=memory,
            peak_tflops=0.05 / seconds,
            utilisation=1.0,
            memory_gbps=60.0,
            up_mbps=bandwidth,
            down_mbps=bandwidth,
            # Its bandwidth is drawn above; a second draw would spread it further.
            net_sigma=0.0,
        )
    return devices


FLEETS: Mapping[str, Callable[[Sequence[str], int], Mapping[str, DeviceProfile]]] = {
    **{name: mixed_fleet(shares) for name, shares in SHARES.items()},
    "lognormal": lognormal_fleet,
}
"""(clients, seed) -> the device of every client; the order of the names does not matter."""
