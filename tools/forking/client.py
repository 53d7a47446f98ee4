"""Stands in the place of `python`: has the process forked by `server.py`, and is to its parent as that process.

Written to a file with an interpreter's line and two names, `SOCKET` and `PYTHON`, before this text.
"""

import json
import os
import signal
import socket
import sys

PASSED_ON = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
REFUSED = 1000


def main() -> None:
    """Ask, pass signals on, end as the process ends."""
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(SOCKET)  # noqa: F821
        request = {"arguments": sys.argv[1:], "folder": os.getcwd(), "environment": dict(os.environ)}  # noqa: PTH109
        text = json.dumps(request).encode()
        socket.send_fds(server, [len(text).to_bytes(8, "big")], [0, 1, 2])
        server.sendall(text)
        for number in PASSED_ON:
            signal.signal(number, lambda number, _: server.sendall(bytes([number])))
        answer = b""
        while len(answer) < 4:
            part = server.recv(4 - len(answer))
            if not part:
                sys.exit("the server of forked interpreters is gone")
            answer += part
    code = int.from_bytes(answer, "big", signed=True)
    for number in PASSED_ON:
        signal.signal(number, signal.SIG_DFL)
    if code == REFUSED:
        os.execv(PYTHON, [PYTHON, *sys.argv[1:]])  # noqa: F821, S606
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


main()
