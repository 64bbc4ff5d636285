#!/usr/bin/env python3
"""Small servers for the chapters 1 to 4, each with one mistake: they test the grader.

Usage: server.py CHAPTER MISTAKE HOST:PORT, where the mistake `none` is a correct server.
Only what the cases in verdicts.txt look at is right here. See the chapters for the rest.
"""

import errno
import select
import signal
import socket
import struct
import sys
import time

if len(sys.argv) != 4:
    sys.exit(__doc__)
CHAPTER, MISTAKE, ADDR = sys.argv[1:]
HOST, PORT = ADDR.rsplit(":", 1)
GREETING = b"hello Lars\n"
MAX_PAYLOAD = 65527


def is_wrong(mistake):
    return MISTAKE == mistake


def one_line(kind, error, _):
    print(f"{kind.__name__}: {error}", file=sys.stderr)


# A traceback depends on the version of Python.
sys.excepthook = one_line
# A shell has its background jobs ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)


def listen():
    family, _, _, _, addr = socket.getaddrinfo(HOST.strip("[]"), int(PORT), type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family)
    if not is_wrong("no-reuseaddr"):
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(addr)
    listener.listen(4096)
    return listener


# ---- Chapters 1 and 2: one client at a time ------------------------------------------------------


def greet(client):
    client.sendall(GREETING.rstrip() + b"\0" if is_wrong("nul-for-newline") else GREETING)
    if is_wrong("closes-unread-input"):
        return
    if not is_wrong("no-end"):
        client.shutdown(socket.SHUT_WR)
    waits = is_wrong("drains-forever") or is_wrong("no-end")
    end = time.monotonic() + 0.5
    while waits or time.monotonic() < end:
        client.settimeout(None if waits else 0.5)
        if not client.recv(65536):
            break


kept = []


def echo(client):
    while data := client.recv(65536):
        if is_wrong("c-string"):
            data = data.split(b"\0")[0]
        if is_wrong("keeps-everything") or is_wrong("echoes-at-the-end"):
            kept.append(data)
        if is_wrong("echoes-at-the-end"):
            continue
        if is_wrong("ignores-partial-writes"):
            client.setblocking(False)
            try:
                client.send(data)
            except BlockingIOError:
                pass
            client.setblocking(True)
        else:
            client.sendall(data)
    if is_wrong("echoes-at-the-end"):
        client.sendall(b"".join(kept))


def serve_one_by_one(handle):
    listener = listen()
    if is_wrong("polls"):
        listener.setblocking(False)
    while True:
        try:
            client, _ = listener.accept()
        except BlockingIOError:
            continue
        client.setblocking(True)
        if is_wrong("leaks-fds"):
            kept.append(client)
        try:
            handle(client)
        except OSError as error:
            if is_wrong("ends-at-a-reset") and not isinstance(error, TimeoutError):
                raise
        if not is_wrong("leaks-fds"):
            client.close()


# ---- Chapters 3 and 4: an event loop -------------------------------------------------------------


class Conn:
    def __init__(self, sock):
        self.sock = sock
        self.input = b""
        self.output = bytearray()
        self.is_at_end = False
        self.is_refused = False
        self.watched = select.EPOLLIN


class Server:
    def __init__(self, answer):
        self.answer = answer
        self.epoll = select.epoll()
        self.listener = listen()
        self.listener.setblocking(is_wrong("blocking-accept"))
        self.conns = {}
        self.is_stopping = False
        self.last = b""
        self.epoll.register(self.listener, select.EPOLLIN)

    def run(self):
        if not is_wrong("no-signal-handler"):
            self.wake, wake = socket.socketpair()
            wake.setblocking(False)
            self.wake.setblocking(False)
            signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: None)
            self.epoll.register(self.wake, select.EPOLLIN)
        while not self.is_stopping or self.conns:
            batch = self.epoll.poll()
            if is_wrong("leaves-the-queue"):
                batch.sort(key=lambda event: event[0] == self.listener.fileno())
            for fd, events in batch:
                if fd == self.listener.fileno():
                    self.accept()
                elif fd in self.conns:
                    self.step(self.conns[fd], events)
                else:
                    self.stop()

    def accept(self):
        while True:
            try:
                sock, _ = self.listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno == errno.EMFILE and is_wrong("ends-without-fds"):
                    raise
                if error.errno == errno.EMFILE and not is_wrong("spins-without-fds"):
                    # The clients wait in the queue until one that is there has gone.
                    self.epoll.unregister(self.listener)
                return
            sock.setblocking(False)
            conn = self.conns[sock.fileno()] = Conn(sock)
            if is_wrong("always-wants-to-write"):
                conn.watched |= select.EPOLLOUT
            if is_wrong("closes-at-urgent-data"):
                conn.watched |= select.EPOLLPRI
            if is_wrong("closes-at-rdhup"):
                conn.watched |= select.EPOLLRDHUP
            self.epoll.register(sock, conn.watched)

    def step(self, conn, events):
        try:
            if events & (select.EPOLLPRI | select.EPOLLRDHUP):
                raise ConnectionAbortedError
            if events & ~select.EPOLLOUT:
                self.read(conn)
                if is_wrong("shared-buffer"):
                    return self.watch(conn)
            self.write(conn)
            if conn.is_at_end and not conn.output:
                self.close(conn)
            else:
                self.watch(conn)
        except BlockingIOError:
            self.watch(conn)
        except OSError:
            if is_wrong("ends-at-a-reset"):
                raise
            if is_wrong("leaks-after-a-reset"):
                self.epoll.unregister(conn.sock)
            else:
                self.close(conn)

    def read(self, conn):
        while not conn.output or is_wrong("no-high-water-mark") or conn.is_refused:
            try:
                data = conn.sock.recv(65536)
            except BlockingIOError:
                return
            if data == b"":
                conn.is_at_end = True
                return
            if conn.is_refused:
                return
            conn.input += data
            self.answer(self, conn)
            if not is_wrong("writes-to-the-end"):
                return
            conn.sock.settimeout(60)
            conn.sock.sendall(conn.output)
            conn.sock.setblocking(False)
            conn.output.clear()

    def write(self, conn):
        if conn.output:
            if is_wrong("shared-buffer"):
                conn.output[:] = self.last[: len(conn.output)]
            sent = conn.sock.send(conn.output)
            del conn.output[: len(conn.output) if is_wrong("ignores-partial-writes") else sent]
        if conn.is_refused and not conn.output:
            if is_wrong("closes-refused-clients"):
                raise ConnectionAbortedError
            try:
                conn.sock.shutdown(socket.SHUT_WR)
            except OSError:
                pass

    def watch(self, conn):
        wanted = conn.watched & (select.EPOLLPRI | select.EPOLLRDHUP)
        wanted |= select.EPOLLOUT if conn.output or is_wrong("always-wants-to-write") else 0
        if not conn.is_at_end and (not conn.output or is_wrong("no-high-water-mark")):
            wanted |= select.EPOLLIN
        if wanted != conn.watched:
            conn.watched = wanted
            self.epoll.modify(conn.sock, wanted)

    def close(self, conn):
        del self.conns[conn.sock.fileno()]
        conn.sock.close()
        try:
            self.epoll.register(self.listener, select.EPOLLIN)
        except (FileExistsError, ValueError):
            pass

    def stop(self):
        self.wake.recv(100)
        self.is_stopping = True
        if is_wrong("exit-code"):
            sys.exit(3)
        if is_wrong("drops-clients-at-the-stop"):
            sys.exit(0)
        if is_wrong("leaves-the-queue"):
            sys.exit(0)
        self.accept()
        self.listener.close()
        end = time.monotonic() + 2
        while self.conns and (time.monotonic() < end or is_wrong("waits-for-everybody")):
            ready = dict(self.epoll.poll(0.2))
            for fd, conn in list(self.conns.items()):
                if fd in ready:
                    self.step(conn, ready[fd])
                elif not conn.output:
                    self.close_gracefully(conn)
        sys.exit(0)

    def close_gracefully(self, conn):
        """Unread input would reset the connection, and cost the client what it has not received."""
        try:
            conn.sock.shutdown(socket.SHUT_WR)
            conn.sock.settimeout(0.5)
            while conn.sock.recv(65536):
                pass
        except OSError:
            pass
        self.close(conn)


def answer_bytes(server, conn):
    conn.output += conn.input
    server.last = conn.input
    conn.input = b""


def answer_messages(server, conn):
    if is_wrong("one-message-a-read"):
        if len(conn.input) < 8:
            raise ConnectionAbortedError
        length = struct.unpack("<i", conn.input[4:8])[0]
        conn.output += conn.input[:8 + length]
        conn.input = b""
        return
    replies = []
    while len(conn.input) >= 8:
        order = ">" if is_wrong("big-endian") else "<"
        number, length = struct.unpack(order + "ii", conn.input[:8])
        if not 0 <= length <= MAX_PAYLOAD:
            if is_wrong("drops-replies-before-a-bad-length"):
                raise ConnectionAbortedError
            if not is_wrong("skips-a-bad-length"):
                conn.is_refused = True
            conn.input = b""
            break
        if len(conn.input) < 8 + length:
            break
        if length == 0 and is_wrong("empty-is-the-end"):
            conn.is_at_end = True
        reply = 1 if is_wrong("one-id") else number
        replies.append(struct.pack("<ii", reply, length) + conn.input[8:8 + length])
        conn.input = conn.input[8 + length:]
    else:
        if is_wrong("forgets-half-a-header"):
            conn.input = b""
    if is_wrong("last-first"):
        replies.reverse()
    conn.output += b"".join(replies)


def main():
    if is_wrong("ends-at-once"):
        sys.exit("server.py: not written yet")
    if CHAPTER == "v01":
        serve_one_by_one(greet)
    elif CHAPTER == "v02":
        serve_one_by_one(echo)
    else:
        Server(answer_bytes if CHAPTER == "v03" else answer_messages).run()


main()
