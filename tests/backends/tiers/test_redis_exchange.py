"""What is made of a server's answers, and of one that lies, dies or says nothing: scripted servers."""

import contextlib
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator

import hiredis
import pytest
import redis

from tmem.backends.tiers.redis_exchange import Command, Demand, Exchange, Open, Traffic, exchange_all
from tmem.backends.tiers.redis_nodes import Nodes
from tmem.backends.tiers.redis_url import RedisAddress
from tmem.errors import TierDownError, TierFullError

from ...waiting import wait_until

VALUE = bytes(range(256)) * 300
WHOLE = b"$%d\r\n%b\r\n" % (len(VALUE), VALUE)
GETS = [Command(b"k%d" % n, ("GET", b"k%d" % n)) for n in range(4)]


class Scripted:
    """Answers each command with what `answer` says: of which connection it is, and the command's words.

    None: not at all. b"": by closing the connection.
    """

    def __init__(self, answer: Callable[[int, list[bytes]], bytes | None]) -> None:
        self._answer = answer
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.connections = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self.connections += 1
                number = self.connections
                threading.Thread(target=self._serve, args=(connection, number), daemon=True).start()

    def _serve(self, connection: socket.socket, number: int) -> None:
        reader = hiredis.Reader()
        with connection, contextlib.suppress(OSError):
            while chunk := connection.recv(65536):
                reader.feed(chunk)
                while words := reader.gets():
                    answer = b"+OK\r\n" if words[0] == b"CLIENT" else self._answer(number, words)
                    if answer == b"":
                        return
                    connection.sendall(answer or b"")

    def pool(self) -> redis.ConnectionPool:
        return redis.ConnectionPool(host="127.0.0.1", port=self.port, protocol=2, socket_timeout=5)

    def nodes(self, timeout_s: float = 5) -> Nodes:
        url = f"redis://127.0.0.1:{self.port}/0?replicas=1&timeout={timeout_s}"
        return Nodes(RedisAddress.parse(url))

    def end(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@pytest.fixture
def scripted() -> Iterator[Callable[[Callable[[int, list[bytes]], bytes | None]], Scripted]]:
    made: list[Scripted] = []

    def make(answer: Callable[[int, list[bytes]], bytes | None]) -> Scripted:
        made.append(Scripted(answer))
        return made[-1]

    yield make
    for one in made:
        one.end()


Make = Callable[[Callable[[int, list[bytes]], bytes | None]], Scripted]


@pytest.mark.parametrize(
    "wrong",
    [WHOLE[:40_000], WHOLE[:3], WHOLE + b"$2\r\nabcd\r\n", b"?\r\n", WHOLE[:-1] + b"x", b":5"],
    ids=["cut value", "cut head", "long value", "no answer", "no end", "cut number"],
)
def test_a_server_that_dies_in_a_value_or_talks_nonsense(scripted: Make, wrong: bytes) -> None:
    """It is asked again over another connection, and no answer goes to another question."""

    def answer(connection: int, words: list[bytes]) -> bytes | None:
        if connection > 1:
            return WHOLE
        return {b"k0": WHOLE, b"k1": wrong}.get(words[1], b"")

    server = scripted(answer)
    nodes = server.nodes()
    assert nodes.run(GETS) == [VALUE] * 4
    assert server.connections == 2
    nodes.close()


def test_a_slot_that_was_on_its_way_to_a_server_that_is_gone(scripted: Make) -> None:
    """Whoever has said ASK is asked again, and has given that up by now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        gone = listener.getsockname()[1]
    asked: list[bytes] = []

    def answer(connection: int, words: list[bytes]) -> bytes | None:
        asked.append(words[1])
        return b"-ASK 7 127.0.0.1:%d\r\n" % gone if asked.count(words[1]) == 1 else WHOLE

    nodes = scripted(answer).nodes()
    assert nodes.run(GETS) == [VALUE] * 4
    nodes.close()


def test_a_server_that_answers_more_than_it_was_asked(scripted: Make) -> None:
    """What was asked for is there; the connection is used by nobody else."""
    server = scripted(lambda connection, words: WHOLE + (b"+OK\r\n" if words[1] == b"k3" else b""))
    nodes = server.nodes()
    for n in range(3):
        assert nodes.run(GETS) == [VALUE] * 4
        assert server.connections == n + 1
    nodes.close()


def test_a_server_that_answers_before_it_was_asked() -> None:
    """The rest of the question must not become part of somebody else's."""
    with socket.create_server(("127.0.0.1", 0)) as hasty:
        port = hasty.getsockname()[1]
        pool = redis.ConnectionPool(host="127.0.0.1", port=port, protocol=2, driver_info=None)
        exchange = Exchange(
            "hasty", pool, [Open(0, Command(b"k", ("SET", b"k", bytes(32 << 20))))], None, 5.0
        )
        traffic, replies = Traffic(), [None]
        traffic.begin([exchange], replies)
        with hasty.accept()[0] as connection:
            connection.settimeout(5)
            connection.sendall(b"+OK\r\n")
            traffic.finish([exchange])
            assert replies == [b"OK"]
            with contextlib.suppress(ConnectionResetError):
                while connection.recv(1 << 20):  # or somebody else's questions come next, over the same one
                    pass
        pool.disconnect()


def test_nobody_waits_for_a_server_that_is_silent(scripted: Make) -> None:
    good, silent = scripted(lambda *_: WHOLE), scripted(lambda *_: None)
    replies: list[object] = [None] * 8
    exchanges = [
        Exchange(name, server.pool(), [Open(first + n, one) for n, one in enumerate(GETS)], None, seconds)
        for first, (name, server, seconds) in zip(
            (0, 4), (("silent", silent, 0.3), ("good", good, 5.0)), strict=True
        )
    ]
    start = time.monotonic()
    exchange_all(exchanges, replies)
    assert time.monotonic() - start < 3
    assert replies == [None] * 4 + [VALUE] * 4
    assert [len(one.left) for one in exchanges] == [4, 0]
    assert "imeout" in exchanges[0].trouble


SETS = [Command(b"k%d" % n, ("SET", b"k%d" % n, b"v")) for n in range(4)]


def sent_twice(
    scripted: Make, first_answers: dict[bytes, Callable[[int], bytes]]
) -> tuple[list[list[bytes]], list[list[bytes]]]:
    """What a server is sent of four commands in one, and then, after it answered some of them so at first."""
    heard: list[list[bytes]] = []
    answers = dict(first_answers)

    def answer(_connection: int, words: list[bytes]) -> bytes | None:
        heard.append(words)
        if (first := answers.pop(words[-1] if words[0] == b"SET" else words[0], None)) is not None:
            return first(server.port)
        return b":1\r\n" if words[0] == b"WAIT" else b"+OK\r\n"

    server = scripted(answer)
    nodes = server.nodes()
    sent = [memoryview(b"*3\r\n$3\r\nSET\r\n$2\r\nk%d\r\n$2\r\nv%d\r\n" % (n, n)) for n in range(4)]
    one = Command(b"k0", ("SET",), sent)
    nodes.run([one, Command(b"k4", ("SET", b"k4", b"v4"))], replicated=True)
    nodes.close()
    end = next(n for n, words in enumerate(heard) if words[0] == b"WAIT") + 1
    return heard[:end], heard[end:]


ALL = [[b"SET", b"k%d" % n, b"v%d" % n] for n in range(5)]


def test_several_in_one_of_which_some_are_refused(scripted: Make) -> None:
    """Only these are sent again: what one side of a slot that moves has the other must not get as well."""
    asked: dict[bytes, Callable[[int], bytes]] = {
        b"v1": lambda port: b"-ASK 7 127.0.0.1:%d\r\n" % port,
        b"v3": lambda _port: b"-TRYAGAIN not yet\r\n",
    }
    before, after = sent_twice(scripted, asked)
    assert before[:-1] == ALL
    again = [words for words in after if words[0] != b"WAIT"]
    assert sorted(again) == sorted([[b"ASKING"], ALL[1], ALL[3]])
    assert again.index([b"ASKING"]) + 1 == again.index(ALL[1])
    full: dict[bytes, Callable[[int], bytes]] = {b"v2": lambda _port: b"-OOM no\r\n"}
    with pytest.raises(TierFullError):
        sent_twice(scripted, full)


def test_several_in_one_count_together(scripted: Make) -> None:
    """Without enough replicas, or with an answer that never comes, all are sent again."""
    few: dict[bytes, Callable[[int], bytes]] = {
        b"WAIT": lambda _port: b":0\r\n",
        b"v1": lambda _port: b"-TRYAGAIN not yet\r\n",
    }
    assert [words for words in sent_twice(scripted, few)[1] if words[0] != b"WAIT"] == ALL
    lost: dict[bytes, Callable[[int], bytes]] = {b"v2": lambda _port: b""}
    before, after = sent_twice(scripted, lost)
    assert before[:-1] == [*ALL[:3], *ALL]
    assert not after


def test_what_was_begun_goes_on_beside_the_rest(scripted: Make) -> None:
    """Over connections of their own; one that is given up closes its own, and the other one ends."""
    server = scripted(lambda _connection, words: b":1\r\n" if words[0] == b"WAIT" else b"+OK\r\n")
    nodes, traffic = server.nodes(), Traffic()
    first = nodes.begin(SETS, traffic, replicated=True)
    given_up = nodes.begin(SETS, traffic, replicated=True)
    last = nodes.begin(SETS, traffic, replicated=True)
    given_up.drop()
    assert last.end() == first.end() == [b"OK"] * 4
    assert server.connections == 3
    assert nodes.begin(SETS, traffic, replicated=True).end() == [b"OK"] * 4
    assert server.connections == 3
    nodes.close()


def test_a_connection_whose_number_another_one_gets() -> None:
    """`Nodes.refresh` closes pools whose connections are in use, and the next attempt gets their numbers."""
    silent = socket.create_server(("127.0.0.1", 0), backlog=64)
    port, traffic = silent.getsockname()[1], Traffic()

    def begun() -> Exchange:
        pool = redis.ConnectionPool(host="127.0.0.1", port=port, protocol=2, driver_info=None)
        exchange = Exchange("silent", pool, [Open(0, GETS[0])], None, 0.2)
        traffic.begin([exchange], [None])
        assert exchange.wire is not None
        return exchange

    def number_of(exchange: Exchange) -> int:
        assert exchange.wire is not None
        return exchange.wire.fileno()

    first = begun()
    number = number_of(first)
    others: list[Exchange] = []
    assert first._pool is not None
    first._pool.disconnect()
    while not others or number_of(others[-1]) != number:
        others.append(begun())
        assert len(others) < 50
    thread = threading.Thread(target=traffic.finish, args=([*others, first],), daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive(), "it is waited for, and nobody looks at it"
    assert [len(one.left) for one in (first, *others)] == [1] * (1 + len(others))
    assert "closed" in first.trouble
    silent.close()


def test_who_has_answered_need_not_wait_for_another_to_connect(scripted: Make) -> None:
    """One node is long to connect to, and has no time left then; the other has answered long before."""
    server = scripted(lambda _connection, _words: b"$1\r\nv\r\n")
    quick = Exchange("quick", server.pool(), [Open(0, GETS[0])], None, 0.5)

    class Slow(Exchange):
        def begin(self, replies: list[object]) -> None:
            while time.monotonic() < quick.until_s:
                select.select([], [], [], quick.until_s - time.monotonic() + 0.001)
            super().begin(replies)

    slow = Slow("slow", None, [Open(1, GETS[1])], None, 0.5)
    replies: list[object] = [None, None]
    exchange_all([quick, slow], replies)
    assert replies == [b"v", None]
    assert (quick.left, len(slow.left)) == ([], 1)


def test_who_has_answered_while_another_was_read_is_not_silent(scripted: Make) -> None:
    """What is done with answers may take long, as where we are paged out: the other's lie there meanwhile."""
    reads = threading.Event()

    def answer(_connection: int, words: list[bytes]) -> bytes:
        assert words[1] == b"k0" or reads.wait(60)
        return b"$1\r\nv\r\n"

    server = scripted(answer)
    other = Exchange("other", server.pool(), [Open(1, GETS[1])], None, 60)

    class Slow(Exchange):
        def receive(self) -> None:
            """Read what is there when the other's answer has come, and its time is up."""
            reads.set()
            assert other.wire is not None
            assert select.select([other.wire], [], [], 60)[0]
            other.until_s = time.monotonic()
            super().receive()

    replies: list[object] = [None, None]
    exchange_all([Slow("slow", server.pool(), [Open(0, GETS[0])], None, 60), other], replies)
    assert replies == [b"v", b"v"]
    assert other.left == []


def test_nodes_that_cannot_be_connected_to_take_the_time_of_one(scripted: Make) -> None:
    """An attempt takes as long as one may be silent, however many there are; who was left out is next."""
    server = scripted(lambda _connection, _words: b"$1\r\nv\r\n")
    tried: list[str] = []

    class Watched(Exchange):
        def begin(self, replies: list[object]) -> None:
            tried.append(self.name)
            super().begin(replies)
            until_s = time.monotonic() + 0.3
            while self.name.startswith("gone") and time.monotonic() < until_s:
                select.select([], [], [], until_s - time.monotonic() + 0.001)

    nodes = server.nodes()
    names = ["gone 1", "gone 2", "here", "gone 3"]

    def attempt() -> list[object]:
        replies: list[object] = [None] * 4
        exchanges = nodes._sorted(
            [
                Watched(
                    name, None if name.startswith("gone") else server.pool(), [Open(n, GETS[n])], None, 0.25
                )
                for n, name in enumerate(names)
            ]
        )
        exchange_all(exchanges, replies)
        assert len(nodes.left_of(exchanges, [])) == replies.count(None)
        return replies

    answers = [attempt() for _ in range(5)]
    assert tried == ["gone 1", "gone 2", "here", "gone 3", "here", "gone 1", "here", "gone 2"]
    assert answers == [[None] * 4] * 2 + [[None, None, b"v", None]] * 3
    nodes.close()


def test_who_waits_for_a_cluster_that_does_not_answer_hears_what_others_heard() -> None:
    """One after the other tried again before, each for as long as that takes."""
    silent = [socket.create_server(("127.0.0.1", 0), backlog=16) for _ in range(2)]
    urls = ",".join(f"127.0.0.1:{one.getsockname()[1]}" for one in silent)
    nodes = Nodes(RedisAddress.parse(f"redis+cluster://{urls}?timeout=2"))
    refusals: list[TierDownError] = []

    def ask() -> None:
        try:
            nodes.primaries()
        except TierDownError as error:
            refusals.append(error)

    class Counted:
        lock, waiting = threading.Lock(), 0

        def __enter__(self) -> None:
            Counted.waiting += 1
            self.lock.acquire()

        def __exit__(self, *error: object) -> None:
            self.lock.release()

    nodes._lock = Counted()  # type: ignore[assignment]
    threads = [threading.Thread(target=ask) for _ in range(6)]
    with Counted.lock:
        for thread in threads:
            thread.start()
        wait_until(lambda: Counted.waiting == 6)
    for thread in threads:
        thread.join()
    assert len(set(map(str, refusals))) == 1
    assert (len(refusals), nodes._tries) == (6, 1)
    for one in silent:
        one.close()
    nodes.close()


def test_a_call_that_is_interrupted_leaves_no_answers_behind(scripted: Make) -> None:
    server = scripted(lambda *_: WHOLE)
    nodes = server.nodes()

    def interrupted(read: object, start: int, end: int) -> object:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        nodes.run(GETS, taken=interrupted)
    assert nodes.run(GETS) == [VALUE] * 4
    assert server.connections == 2
    nodes.close()


@pytest.mark.parametrize(
    ("error", "asked", "refusal"),
    [
        (b"-MOVED 7 127.0.0.1:5\r\n", None, None),
        (b"-ASK 7 127.0.0.1:5\r\n", "127.0.0.1:5", None),
        (b"-TRYAGAIN later\r\n", None, None),
        (b"-CLUSTERDOWN it is\r\n", None, None),
        (b"-READONLY replica\r\n", None, None),
        (b"-LOADING memory\r\n", None, None),
        (b"-NOREPLICAS enough\r\n", None, None),
        (b"-OOM used\r\n", None, TierFullError),
        (b"-NOAUTH required\r\n", None, TierDownError),
        (b"-WRONGTYPE kind\r\n", None, TierDownError),
    ],
    ids=lambda value: value.split()[0].decode() if isinstance(value, bytes) else "",
)
@pytest.mark.parametrize("copies", [1, 0])
def test_what_errors_mean(
    scripted: Make, error: bytes, asked: str | None, refusal: type[Exception] | None, copies: int
) -> None:
    """The batch waits for `copies` of one replica, so without it all of it is left."""

    def answer(_connection: int, words: list[bytes]) -> bytes:
        if words[0] == b"WAIT":
            return b":%d\r\n" % copies
        return error if words[1] == b"k2" else b"+OK\r\n"

    server = scripted(answer)
    group = [Open(n, Command(b"k%d" % n, ("SET", b"k%d" % n, VALUE))) for n in range(4)]
    replies: list[object] = [None] * 4
    exchange = Exchange("it", server.pool(), group, Demand(1), 5.0)
    exchange_all([exchange], replies)
    assert (refusal is None) == (exchange.refusal is None)
    if refusal is not None:
        assert isinstance(exchange.refusal, refusal)
    elif error.startswith(b"-LOADING") or not copies:
        assert exchange.left == group
    else:
        assert exchange.left == [group[2]]
        assert replies == [b"OK", b"OK", None, b"OK"]
    if not error.startswith((b"-LOADING", b"-NOAUTH")):  # those close the connection
        assert group[2].asked == asked
