"""Which address a role binds, and which one it tells other nodes to dial.

Runs in the supervisor process, before anything is bound.
"""

import socket

import msgspec

from lightllm.addresses import is_loopback
from lightllm.config import Config
from lightllm.errors import ConfigError


def bind_address(config: Config) -> tuple[str, int]:
    """Where this role serves HTTP."""
    directory = config.config_server
    if config.server.run_mode != "config_server":
        return config.server.host, config.server.port
    assert directory.config_server_host is not None
    assert directory.config_server_port is not None
    return directory.config_server_host, directory.config_server_port


def with_advertised_host(config: Config) -> Config:
    """Fill in what other nodes dial where the user left it open, and refuse what they could not reach.

    Raises:
        ConfigError: a loopback address is advertised towards another machine.
    """
    server = config.server
    peer = config.pd.pd_master_ip or config.config_server.config_server_host
    if server.run_mode in ("normal", "config_server") or peer is None:
        host = server.advertise_host or server.host
    else:
        host = server.advertise_host or _source_address(peer)
        if is_loopback(host) and not _is_of_this_machine(peer):
            raise ConfigError(
                f"--host {server.host}: other nodes would be told to dial {host}, which is this machine, and "
                f"{peer} is another one; give --host or --advertise_host an address that it can reach"
            )
    return msgspec.structs.replace(config, server=msgspec.structs.replace(server, advertise_host=host))


def _source_address(peer: str) -> str:
    """The address of this machine from which `peer` is reached; nothing is sent."""
    try:
        family, _, _, _, address = socket.getaddrinfo(peer, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise ConfigError(
            f"{peer} cannot be reached from here ({error}); check the address, or give --advertise_host"
        ) from error


def _is_of_this_machine(host: str) -> bool:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind(address)
    except OSError:
        return False
    return True
