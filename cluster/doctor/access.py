"""Who can reach Ray here: ports, addresses that are listened on, token authentication."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from cluster.doctor.findings import Check, must, should
from cluster.doctor.probe import RAY_PORTS, is_exposed

Listener = Mapping[str, Any]
"""See ``probe.listeners``."""

SERVE_PORT = next(port for port, what in RAY_PORTS.items() if what == "serve")
_LONGEST_TITLE = 40


def check_ports(listeners: Iterable[Listener]) -> Check:
    """Ray's usual ports are free, or Ray's own."""
    texts, foreign = [], []
    by_port = {one["port"]: one for one in listeners}
    for port, what in RAY_PORTS.items():
        one = by_port.get(port)
        texts.append(f"{port} {what}: " + ("free" if one is None else f"{_short(one['title'])} on {one['address']}"))
        if one is not None and not one["is_ray"]:
            foreign.append(f"{port}")
    return should(
        "ray ports",
        not foreign,
        "; ".join(texts),
        "free, or Ray's: `ray start --head` and services take them",
        f"Stop what listens on {', '.join(foreign)}, or give Ray other ports (--port, --dashboard-port, "
        "--ray-client-server-port). A cluster that a run starts for itself takes free ones.",
    )


def check_bind_addresses(listeners: Iterable[Listener], where: str = "") -> Check:
    """What of Ray other machines can reach asks for a token. ``where`` names the machine, if it is not this one."""
    name = f"bind addresses{where}"
    exposed = [one for one in listeners if one["is_ray"] and is_exposed(one["address"])]
    services = [one for one in exposed if one["port"] == SERVE_PORT]
    open_to_all = [one for one in exposed if one["asks_token"] is False and one not in services]
    unseen = [one for one in exposed if one["asks_token"] is None and one not in services]
    needed = "loopback addresses, or a token to be asked for"
    if open_to_all:
        action = (
            "Whoever reaches these ports can run code here. Stop this cluster, `export RAY_AUTH_MODE=token`, "
            "`ray get-auth-token --generate`, and start it again with the same token on every node."
        )
        return must(name, False, f"{_listed(open_to_all)} without a token", needed, action)
    if services:
        action = (
            "Ray Serve asks for no token by itself: let it listen on 127.0.0.1 (http_options host), or put something "
            "in front of it that asks for one."
        )
        return should(name, False, _listed(services), "services on loopback addresses", action)
    action = "Look as the user who started it, or ask them whether RAY_AUTH_MODE=token is set."
    found = f"{_listed(unseen)}, and whether with a token cannot be seen" if unseen else _listed(exposed)
    with_token = f"{found}, with a token" if exposed and not unseen else found
    return should(name, not unseen, with_token or "nothing of Ray's", needed, action)


def check_authentication(
    environ: Mapping[str, str], token: Mapping[str, Any] | None, user: int, *, joins: bool = False, where: str = ""
) -> list[Check]:
    """Whether Ray asks for a token, and whether the token is this user's alone.

    Args:
        environ: The environment that Ray starts from.
        token: See ``probe.token``.
        user: Number of the user who looks.
        joins: Whether a cluster is joined, which needs a token that is there already.
        where: Names the machine, if it is not this one.
    """
    mode = environ.get("RAY_AUTH_MODE", "").lower()
    found = f"RAY_AUTH_MODE={mode}" if mode else "RAY_AUTH_MODE unset"
    checks = [
        must(
            f"ray authentication{where}",
            mode in ("", "token"),
            found,
            "token, or unset: Ray then asks for a token where there is one, and in every cluster that a run starts",
            "Unset RAY_AUTH_MODE: without a token whoever reaches Ray's ports can run code here.",
        )
    ]
    named = environ.get("RAY_AUTH_TOKEN_PATH", "")
    name = f"ray token{where}"
    if token is None and (named or (joins and mode == "token")):
        action = (
            "Copy the cluster's token (`ray get-auth-token` on its head) to ~/.ray/auth_token, mode 600, or name its "
            "file in RAY_AUTH_TOKEN_PATH."
        )
        checks.append(must(name, False, f"no file {named}" if named else "none", "the cluster's token", action))
    elif token is None:
        checks.append(must(name, True, "none yet", "none, until Ray writes one at its first start", ""))
    else:
        checks.append(_check_token(name, token, user))
    return checks


def _check_token(name: str, token: Mapping[str, Any], user: int) -> Check:
    if token["mode"] is None:
        return must(name, True, "in the environment (RAY_AUTH_TOKEN)", "a token", "")
    path, mode = token["path"], token["mode"]
    if token["size"] == 0:
        action = "`ray get-auth-token --generate`, or copy the cluster's token into it."
        return must(name, False, f"{path} is empty", "a token", f"Remove the file, then {action}")
    if token["owner"] != user:
        needed = f"a file of user {user}"
        action = f"Whoever owns it can change it: copy it to a file of your own, mode 600 (chown {user} {path})."
        return must(name, False, f"{path} belongs to user {token['owner']}", needed, action)
    found, needed = f"mode {mode:o}", "readable by you alone (600)"
    return should(name, mode & 0o077 == 0, found, needed, f"chmod 600 {path}")


def _listed(listeners: Iterable[Listener]) -> str:
    """One text; many ports of one process come together."""
    ports: dict[tuple[str, str], list[str]] = {}
    for one in listeners:
        ports.setdefault((_short(one["title"]), one["address"]), []).append(str(one["port"]))
    return "; ".join(f"{title} on {address} port {', '.join(numbers)}" for (title, address), numbers in ports.items())


def _short(title: str) -> str:
    """A process's program, without the folder that it lies in and without its arguments."""
    words = title.split()
    program = words[0].rsplit("/", 1)[-1] if words else ""
    if program.startswith("python") and len(words) > 1:
        program += " " + " ".join(word.rsplit("/", 1)[-1] for word in words[1:3])
    return program[:_LONGEST_TITLE]
