"""hostile_server.py MODE: a server on a free port of the loopback, which it prints, that breaks the rules of Redis and
HTTP in one way. It serves one connection after another until it is killed."""

import itertools
import socket
import sys
import time

MEGABYTE = b"x" * (1 << 20)


def drip(piece):
    """One byte every tenth of a second: never idle for long, and never done."""
    while True:
        yield piece
        time.sleep(0.1)


HTTP = b"HTTP/1.1 200 OK\r\n"
ANSWERS = {
    "silent": lambda: drip(b""),
    "close": lambda: [],
    "garbage": lambda: [b"\x00\xff" * 1000],
    "redis-array": lambda: itertools.chain([b"*2147483647\r\n"], drip(b"")),
    "redis-nested": lambda: itertools.chain([b"*1\r\n" * 20], drip(b"")),
    "redis-endless": lambda: itertools.chain([b"$100000000000\r\n"], itertools.repeat(MEGABYTE)),
    "redis-drip": lambda: itertools.chain([b"$1000\r\n"], drip(b"x")),
    "redis-long": lambda: [b"$2000000\r\n" + b"x" * 2000000 + b"\r\n"],
    "redis-kind": lambda: [b":5\r\n"],
    "http-endless": lambda: itertools.chain([HTTP + b"\r\n"], itertools.repeat(MEGABYTE)),
    "http-announced": lambda: itertools.chain([HTTP + b"Content-Length: 100000000000\r\n\r\n"], drip(b"x")),
    "http-header": lambda: itertools.chain([HTTP + b"X: "], itertools.repeat(MEGABYTE)),
    "http-drip": lambda: itertools.chain([HTTP + b"Content-Length: 64\r\n\r\n"], drip(b"x")),
    "http-short": lambda: [HTTP + b"Content-Length: 64\r\n\r\nxxx"],
    "http-redirect": lambda: [b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\nContent-Length: 0\r\n\r\n"],
    "http-403": lambda: [HTTP.replace(b"200 OK", b"403 No") + b"Content-Length: 25\r\n\r\n<Code>AccessDenied</Code>\n"],
    "http-500": lambda: [b"HTTP/1.1 500 No\r\nContent-Length: 6\r\n\r\n<Code>"],
}


def serve(connection, answer):
    try:
        connection.settimeout(20)
        connection.recv(65536)
        for piece in answer():
            connection.sendall(piece)
    except OSError:
        pass  # the other side has had enough
    finally:
        connection.close()


def main():
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    while True:
        serve(listener.accept()[0], ANSWERS[sys.argv[1]])


main()
