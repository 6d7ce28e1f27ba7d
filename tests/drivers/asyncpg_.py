"""asyncpg: binary everywhere, prepared by default, cursors on portals."""

import asyncio
import datetime
import decimal
import io
import os
import uuid

import asyncpg


def say(*words):
    print(*[repr(word) if not isinstance(word, str) else word for word in words], flush=True)


async def fails(what, work):
    try:
        say(what, "went well:", await work)
    except asyncpg.PostgresError as error:
        say(what, error.sqlstate, str(error).splitlines()[0])


async def main():
    connection = await asyncpg.connect(ssl=False if os.environ.get("PGSSLMODE") == "disable" else None, statement_cache_size=50)
    version = connection.get_server_version()
    say("server", version.major, connection.get_settings().client_encoding)
    await connection.execute("SET client_min_messages = warning; DROP TABLE IF EXISTS d; CREATE TABLE d (id int PRIMARY KEY, t text, n numeric)")
    typed = {
        "int4": 42, "int8": 1 << 40, "float8": 1.5, "numeric": decimal.Decimal("12345.678900"), "text": "wörd \U0001f600", "bytea": b"\x00\xff",
        "bool": True, "int4[]": [1, None, 3], "text[]": ["a", 'b"'], "uuid": uuid.UUID(int=7), "date": datetime.date(2024, 2, 29),
        "timestamptz": datetime.datetime(2024, 2, 29, 12, 34, tzinfo=datetime.timezone.utc), "interval": datetime.timedelta(days=1, seconds=2),
        "jsonb": '{"a": [1]}', "int4range": asyncpg.Range(1, 5), "point": asyncpg.Point(1, 2), "inet": None,
    }
    for name, value in typed.items():
        say("type", name, await connection.fetchval(f"SELECT $1::{name}", value))
    statement = await connection.prepare("SELECT id, t FROM d WHERE id = $1")
    say("statement", [attribute.name for attribute in statement.get_attributes()], [parameter.name for parameter in statement.get_parameters()])
    await connection.executemany("INSERT INTO d (id, t) VALUES ($1, $2)", [(key, f"row {key}") for key in range(200)])
    for key in range(5):
        say("prepared", tuple(await statement.fetchrow(key)))
    async with connection.transaction():
        found = []
        async for row in connection.cursor("SELECT id FROM d ORDER BY id", prefetch=7):
            found.append(row[0])
        say("cursor", len(found), sum(found))
        cursor = await connection.cursor("SELECT id FROM d ORDER BY id")
        say("cursor", await cursor.fetch(3), await cursor.forward(5), await cursor.fetchrow())
    async with connection.transaction():
        await connection.execute("UPDATE d SET n = 1.5 WHERE id = 1")
        try:
            async with connection.transaction():
                await connection.execute("UPDATE d SET n = 2.5 WHERE id = 1")
                await connection.execute("SELECT 1 / 0")
        except asyncpg.DivisionByZeroError as error:
            say("inner", error.sqlstate)
    say("savepoint", await connection.fetchval("SELECT n FROM d WHERE id = 1"))
    for text in ("SELECT nonsense", "SELEC", "SELECT 1 / 0", "SELECT * FROM nowhere", "INSERT INTO d (id) VALUES (1)"):
        await fails(text, connection.fetch(text))
    say("after", await connection.fetchval("SELECT 'still here'"))
    await connection.execute("ALTER TABLE d ADD COLUMN more int DEFAULT 3")
    star = await connection.fetchrow("SELECT * FROM d WHERE id = 1")
    await connection.execute("ALTER TABLE d ADD COLUMN yet int DEFAULT 4")
    say("replanned", tuple(star), tuple(await connection.fetchrow("SELECT * FROM d WHERE id = 1")))
    say("copied", await connection.copy_records_to_table("d", records=[(key, "copied " * 30) for key in range(1000, 4000)], columns=["id", "t"]))
    out = io.BytesIO()
    say("copy", await connection.copy_from_query("SELECT id, t FROM d WHERE id < 3 ORDER BY id", output=out, format="csv"), out.getvalue())
    await fails("copy of a wrong row", connection.copy_to_table("d", source=io.BytesIO(b"x\ty\n"), columns=["id", "t"]))

    async def gives_up():
        yield b"9000\tfirst\n"
        raise ValueError("the client gives up")

    try:
        await connection.copy_to_table("d", source=gives_up(), columns=["id", "t"])
    except ValueError as error:
        say("given up", str(error))
    say("count", await connection.fetchval("SELECT count(*) FROM d"))
    heard = asyncio.Queue()
    await connection.add_listener("news", lambda _, __, channel, payload: heard.put_nowait((channel, payload)))
    notices = asyncio.Queue()
    connection.add_log_listener(lambda _, message: notices.put_nowait((message.severity, message.message)))
    other = await asyncpg.connect()
    for payload in ("one", "zwei ä"):
        await other.execute("SELECT pg_notify('news', $1)", payload)
    say("notified", await asyncio.wait_for(heard.get(), 30), await asyncio.wait_for(heard.get(), 30))
    await connection.execute("SET client_min_messages = notice; DO $$ BEGIN RAISE NOTICE 'seen'; END $$")
    say("notice", await asyncio.wait_for(notices.get(), 30))
    try:
        await asyncio.wait_for(connection.fetch("SELECT pg_sleep(60)"), 0.4)
    except asyncio.TimeoutError:
        say("timed out and cancelled", await connection.fetchval("SELECT 'usable'"))
    large = "0123456789" * 300_000
    row = await connection.fetchrow("SELECT $1::text, md5($1)", large)
    say("large", row[0] == large, row[1], len(await connection.fetch("SELECT generate_series(1, 50000), repeat('r', 50)")))
    async with asyncpg.create_pool(min_size=3, max_size=3) as pool:
        say("pool", sorted(await asyncio.gather(*[pool.fetchval("SELECT $1::int * 2", key) for key in range(30)])))
    await connection.reset()
    await connection.execute("DROP TABLE d")
    await other.close()
    await connection.close()


asyncio.run(main())
