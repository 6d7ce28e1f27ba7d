"""pg8000: a driver in pure Python with its own idea of the protocol."""

import datetime
import decimal
import io
import os
import uuid

import pg8000.dbapi
import pg8000.native


def say(*words):
    print(*[repr(word) if not isinstance(word, str) else word for word in words], flush=True)


where = dict(user=os.environ["PGUSER"], password=os.environ["PGPASSWORD"], host=os.environ["PGHOST"], port=int(os.environ["PGPORT"]), database=os.environ["PGDATABASE"])
native = pg8000.native.Connection(**where, application_name="pg8000")
say("status", native.parameter_statuses.get("server_version"), native.parameter_statuses.get("application_name"))
native.run("SET client_min_messages = warning")
native.run("DROP TABLE IF EXISTS d")
native.run("CREATE TABLE d (id int PRIMARY KEY, t text)")
for value in [42, 1 << 40, 1.5, decimal.Decimal("1.50"), "wörd \U0001f600", b"\x00\xff", True, None, [1, None], uuid.UUID(int=7),
              datetime.date(2024, 2, 29), datetime.datetime(2024, 2, 29, 1, 2, 3, tzinfo=datetime.timezone.utc), {"a": [1]}]:
    say("type", native.run("SELECT :v", v=value))
statement = native.prepare("INSERT INTO d VALUES (:id, :t) RETURNING id")
say("prepared", [statement.run(id=key, t=f"row {key}") for key in range(10)], [column["name"] for column in statement.columns])
statement.close()
native.run("BEGIN")
try:
    native.run("SELECT 1 / 0")
except pg8000.native.DatabaseError as error:
    say("error", error.args[0]["C"], error.args[0]["M"])
native.run("ROLLBACK")
say("simple", native.run("SELECT 1; SELECT 2"))
native.run("COPY d FROM STDIN WITH (FORMAT csv)", stream=io.BytesIO(b"".join(b"%d,copied\n" % key for key in range(100, 3000))))
out = io.BytesIO()
native.run("COPY (SELECT * FROM d WHERE id < 103 ORDER BY id) TO STDOUT", stream=out)
say("copied", out.getvalue(), native.run("SELECT count(*) FROM d"))
try:
    native.run("COPY d FROM STDIN", stream=io.BytesIO(b"x\ty\n"))
except pg8000.native.DatabaseError as error:
    say("copy error", error.args[0]["C"])
native.run("LISTEN news")
native.run("NOTIFY news, 'own'")
native.run("SELECT 1")
say("notified", [(channel, payload) for _, channel, payload in native.notifications])
native.run("SET client_min_messages = notice")
native.run("DO $$ BEGIN RAISE NOTICE 'seen'; END $$")
say("notices", [notice[b"M"] for notice in native.notices])
dbapi = pg8000.dbapi.connect(**where)
cursor = dbapi.cursor()
cursor.execute("SELECT id, t FROM d WHERE id < %s ORDER BY id", (5,))
say("dbapi", cursor.fetchall(), [column[0] for column in cursor.description])
cursor.executemany("UPDATE d SET t = %s WHERE id = %s", [(f"new {key}", key) for key in range(5)])
dbapi.rollback()
cursor.execute("SELECT t FROM d WHERE id = 3")
say("rolled back", cursor.fetchone())
large = "0123456789" * 200_000
say("large", native.run("SELECT :v::text", v=large)[0][0] == large)
dbapi.close()
native.run("DROP TABLE d")
native.close()
