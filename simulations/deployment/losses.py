"""What Flower's programs say when they are not let in or have lost a message, and what that means."""

import os
import re
import subprocess
import time
from pathlib import Path

LOOK_SECONDS = 1.0

_LOST = re.compile(r"Failed to (?:receive|send) message .*")
_REFUSED = "Failed to activate SuperNode"


def explained(words: str, log: Path) -> tuple[str, str]:
    """Return why a program did not start, by its last words, and what to do about it."""
    if _REFUSED not in words:
        return words, f"see {log}"
    # Flower says the same of both.
    return (
        "the server does not know this machine's key, or holds that it is connected already",
        "have key.pub put into keys/ on the server and the server started anew; "
        "if a program with this key has just been killed, try again in a minute",
    )


def until_it_ends(process: subprocess.Popen[bytes], log: Path) -> str:
    """Wait until a program ends, or says from now on that it has lost a message: return its words then.

    Flower drops a message that a link broke under, and its server waits for the answer for half a day: unless the
    client leaves, which is noticed.
    """
    with log.open("rb") as file:
        file.seek(0, os.SEEK_END)
        part = b""
        while process.poll() is None:
            time.sleep(LOOK_SECONDS)
            *lines, part = (part + file.read()).split(b"\n")
            for line in lines:
                if found := _LOST.search(line.decode(errors="replace")):
                    return found.group()[:300]
    return ""
