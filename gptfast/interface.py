"""Which network interface leads to another host, for gloo: left alone it asks what this host's name
stands for, which on many systems is an address that no other host can reach (127.0.1.1).
"""

import socket
import struct
import sys

SIOCGIFADDR = 0x8915  # linux/sockios.h: the IPv4 address of an interface
NAME_BYTES, ADDRESS_AT = 256, 20  # of what that reads and fills (struct ifreq)


def interface_to(host: str) -> str | None:
    """Its name ("eth0"); None where `host` is this one, and where it cannot be said: no IPv4, no
    Linux, no way to there.
    """
    if sys.platform != "linux":
        return None
    from fcntl import ioctl  # not on Windows

    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # sends nothing
            own = probe.getsockname()[0]
            if own.startswith("127."):
                return None
            for _, name in socket.if_nameindex():
                request = struct.pack(f"{NAME_BYTES}s", name.encode())
                try:
                    found = ioctl(probe.fileno(), SIOCGIFADDR, request)
                except OSError:  # it has no address
                    continue
                if socket.inet_ntoa(found[ADDRESS_AT : ADDRESS_AT + 4]) == own:
                    return name
    except OSError:
        pass
    return None
