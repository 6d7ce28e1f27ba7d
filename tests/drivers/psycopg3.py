"""psycopg 3: what an application does with it, as a transcript. Host, port, user, password, database: PG* variables."""

import datetime
import decimal
import threading
import time
import uuid

import psycopg
from psycopg import sql
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb


def say(*words):
    print(*[repr(word) if not isinstance(word, str) else word for word in words], flush=True)


def fails(what, work):
    try:
        say(what, "went well:", work())
    except psycopg.Error as error:
        say(what, error.sqlstate or type(error).__name__, error.diag.severity_nonlocalized or "", error.diag.message_primary or "")


connection = psycopg.connect("application_name=psycopg3", autocommit=True)
say("server", connection.info.server_version, connection.info.encoding, connection.info.parameter_status("application_name"))
connection.execute("SET client_min_messages = warning; DROP TABLE IF EXISTS d; CREATE TABLE d (id int PRIMARY KEY, t text, n numeric, at timestamptz, j jsonb)")

values = [42, 1 << 40, 1.5, decimal.Decimal("12345.678900"), "wörd \U0001f600", b"\x00\xff\x01", True, None, [1, None, 3], ["a", 'b"'],
          uuid.UUID(int=7), datetime.date(2024, 2, 29), datetime.datetime(2024, 2, 29, 12, 34, 56, 789, datetime.timezone.utc),
          datetime.timedelta(days=1, seconds=2), Jsonb({"a": [1, {"b": None}]})]
for binary in (False, True):
    for value in values:
        row = connection.execute("SELECT %t" if not binary else "SELECT %b" if not isinstance(value, Jsonb) else "SELECT %t", [value], binary=binary).fetchone()
        say("type", binary, row[0])

for prepare in (True, None, False):
    for key in range(7):
        cursor = connection.execute("SELECT %s::int * 2, %s::text", [key, "x" * key], prepare=prepare)
        say("prepared", str(prepare), cursor.fetchone())

with connection.pipeline() as pipeline:
    cursors = [connection.execute("INSERT INTO d (id, t) VALUES (%s, %s) RETURNING id, t", [key, f"row {key}"]) for key in range(20)]
    pipeline.sync()
    cursors += [connection.execute("SELECT count(*) FROM d WHERE id < %s", [key]) for key in range(10)]
say("pipeline", [cursor.fetchone() for cursor in cursors])
try:
    with connection.pipeline() as pipeline:
        first = connection.execute("SELECT 1")
        connection.execute("SELECT 1 / 0")
        later = connection.execute("SELECT 2")
        pipeline.sync()
        say("unreachable")
except psycopg.Error as error:
    say("pipeline error", error.sqlstate)
say("after", connection.execute("SELECT 'still here'").fetchone())

with connection.transaction():
    connection.execute("UPDATE d SET n = 1.10 WHERE id = 1")
    try:
        with connection.transaction():
            connection.execute("UPDATE d SET n = 2.20 WHERE id = 1")
            raise psycopg.Rollback
    except psycopg.Rollback:
        pass
    say("status", str(connection.info.transaction_status))
say("savepoint", connection.execute("SELECT n FROM d WHERE id = 1").fetchone())
connection.autocommit = False
fails("unique", lambda: connection.execute("INSERT INTO d (id) VALUES (1)"))
say("status", str(connection.info.transaction_status))
fails("aborted", lambda: connection.execute("SELECT 1"))
connection.rollback()
connection.autocommit = True
for text in ("SELECT nonsense", "SELEC", "SELECT 1 / 0", "SELECT * FROM nowhere", "SELECT pg_sleep('x')"):
    fails(text, lambda: connection.execute(text))

with connection.cursor() as cursor:
    with cursor.copy("COPY d (id, t) FROM STDIN") as copy:
        for key in range(100, 2100):
            copy.write_row((key, "copied " * 20))
    with cursor.copy("COPY d (id, n) FROM STDIN WITH (FORMAT binary)") as copy:
        copy.set_types(["int4", "numeric"])
        copy.write_row((3000, decimal.Decimal("3.14")))
    with cursor.copy("COPY (SELECT id, t FROM d WHERE id BETWEEN 99 AND 103 ORDER BY id) TO STDOUT") as copy:
        say("copy out", [row for row in copy.rows()])

    def wrong_row():
        with cursor.copy("COPY d (id) FROM STDIN") as copy:
            copy.write("not a number\n")

    def given_up():
        with cursor.copy("COPY d (id) FROM STDIN") as copy:
            copy.write("5000\n")
            raise ValueError("the client gives up")

    fails("copy of a wrong row", wrong_row)
    try:
        given_up()
    except ValueError as error:
        say("given up", str(error))
say("count", connection.execute("SELECT count(*) FROM d").fetchone())

with connection.transaction(), connection.cursor("named", row_factory=dict_row) as cursor:
    cursor.execute("SELECT id, t FROM d WHERE id < 20 ORDER BY id")
    say("server cursor", cursor.fetchmany(3), cursor.fetchone(), len(cursor.fetchall()))
with connection.cursor() as cursor:
    rows = [row[0] for row in cursor.stream("SELECT generate_series(1, 1000)")]
    say("streamed", len(rows), sum(rows))
    cursor.executemany("INSERT INTO d (id, t) VALUES (%s, %s) RETURNING id", [(key, None) for key in range(6000, 6010)], returning=True)
    say("many", cursor.rowcount)

notices = []
connection.add_notice_handler(lambda diag: notices.append((diag.severity, diag.message_primary)))
connection.execute("SET client_min_messages = notice")
connection.execute("DO $$ BEGIN RAISE NOTICE 'seen %', 7; RAISE WARNING 'warned'; END $$")
say("notices", notices)

connection.execute("LISTEN news")
with psycopg.connect(autocommit=True) as other:
    for payload in ("one", "zwei ä"):
        other.execute("SELECT pg_notify('news', %s)", [payload])
say("notified", [(one.channel, one.payload) for one in connection.notifies(timeout=30, stop_after=2)])

threading.Timer(0.4, connection.cancel).start()
fails("cancelled", lambda: connection.execute("SELECT pg_sleep(60)"))
large = "0123456789" * 300_000
row = connection.execute("SELECT %s::text, md5(%s), length(%s)", [large, large, large]).fetchone()
say("large", row[0] == large, row[1:], len(connection.execute("SELECT repeat('y', 5000000)").fetchone()[0]))
say("large binary", len(connection.execute("SELECT %b::bytea", [bytes(range(256)) * 8000], binary=True).fetchone()[0]))
connection.execute("SET TimeZone = 'Asia/Tokyo'")
say("parameter", connection.info.parameter_status("TimeZone"), connection.execute("SELECT '2024-01-01 00:00+00'::timestamptz").fetchone()[0].isoformat())
connection.execute(sql.SQL("DROP TABLE {}").format(sql.Identifier("d")))
latin = psycopg.connect("client_encoding=latin1", autocommit=True)
say("latin1", latin.info.encoding, latin.execute("SELECT 'é' || %s, length('éè')", ["ü"]).fetchone())
connection.close()
