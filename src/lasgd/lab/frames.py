"""How long the frames of an emulated link are, and how much of them is what the ranks send.

The kernel releases one frame after the other, each by a timer of its own, at both ends of a link. With ordinary frames,
4 ranks and 20 mbit/s full both ways that is 2.5e6 / 1514 * 8 = 13,000 timers a second, whose time is the ranks'. So
frames are as long as in data centres, where the link is fast enough.
"""

ORDINARY_BYTES = 1500
LONGEST_BYTES = 9000
LONGEST_S = 3.6e-3
"""That a frame may take: longer ones would make a slow link a coarse one."""

_TCP_BYTES, _ETHERNET_BYTES = 52, 14  # of each frame: IP's 20 and TCP's 32 with its time stamps; Ethernet's come on top


def mtu_bytes(bandwidth_bytes_per_s: float) -> int:
    """A frame's IP packet at most: 1500 bytes, and up to 9000 from 20 mbit/s on."""
    return round(min(LONGEST_BYTES, max(ORDINARY_BYTES, LONGEST_S * bandwidth_bytes_per_s)))


def frame_bytes(bandwidth_bytes_per_s: float) -> int:
    """A frame at most, as the kernel's filter counts it."""
    return mtu_bytes(bandwidth_bytes_per_s) + _ETHERNET_BYTES


def payload_share(bandwidth_bytes_per_s: float) -> float:
    """Of what a condition's link carries in full frames; the filter counts headers too."""
    mtu = mtu_bytes(bandwidth_bytes_per_s)
    return (mtu - _TCP_BYTES) / (mtu + _ETHERNET_BYTES)
