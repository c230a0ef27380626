"""Running as root, as in containers: PostgreSQL refuses to, so it gets another account.

The account owns only the database's folder. Where it could not even reach that folder or the
program (a clone in /root, mode 0700), it is given the one capability to pass, rather than opening
somebody's home to everybody.
"""

import os
import pwd
import shutil
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from noisemill.local.processes import LocalError


@dataclass(frozen=True)
class Account:
    """An existing account without rights."""

    uid: int
    gid: int

    def command(self, command: Sequence[str], *, reaching: Sequence[Path]) -> list[str]:
        """``command``, wrapped to run under this account with access to the paths in ``reaching``."""
        setpriv = shutil.which("setpriv")
        if setpriv is None:
            raise LocalError(
                "PostgreSQL does not run as root, and setpriv (util-linux) is not here to change the "
                "user. Run noisemill as another user, or set NOISEMILL_DATABASE_URL to a running server."
            )
        flags = [
            f"--reuid={self.uid}",
            f"--regid={self.gid}",
            "--clear-groups",
            "--no-new-privs",
        ]
        if not all(_is_open_to_all(path) for path in reaching):
            # access(2), which PostgreSQL asks about its own programs, heeds capabilities of a
            # plain user only with no_setuid_fixup.
            flags += [
                "--securebits=+no_setuid_fixup",
                "--inh-caps=+dac_override",
                "--ambient-caps=+dac_override",
            ]
        return [setpriv, *flags, *command]


def unprivileged() -> Account | None:
    """The account to use instead of root; None when we are not root."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return Account(entry.pw_uid, entry.pw_gid)
    raise LocalError("PostgreSQL does not run as root, and there is neither a postgres nor a nobody account.")


def _is_open_to_all(path: Path) -> bool:
    return all(parent.stat().st_mode & stat.S_IXOTH for parent in path.parents if parent.exists())
