\set VERBOSITY verbose
\pset pager off
\encoding
SET client_min_messages = warning;
DROP TABLE IF EXISTS d;
DROP TYPE IF EXISTS d_mood;
CREATE TYPE d_mood AS ENUM ('sad', 'ok', 'happy');
CREATE TABLE d (id int PRIMARY KEY, t text, n numeric(10, 2), m d_mood, at timestamptz, y bytea, a int[], j jsonb);
SET client_min_messages = notice;
INSERT INTO d SELECT k, 'row ' || k, k * 1.25, 'ok', '2024-02-29 12:00+00', decode('00ff', 'hex'), ARRAY[k, NULL], '{"a": 1}' FROM generate_series(1, 30) k;
\d d
\dT d_mood
SELECT * FROM d WHERE id < 3 ORDER BY id;
\x on
SELECT * FROM d WHERE id = 3;
\x off
SELECT id, m FROM d ORDER BY id LIMIT 3 \gdesc
SELECT id AS first, t FROM d ORDER BY id LIMIT 1 \gset
\echo :first :t
SELECT 1; SELECT 2\; SELECT 3;
BEGIN;
SAVEPOINT a;
SELECT 1 / 0;
SELECT 1;
ROLLBACK TO a;
SELECT 'usable';
COMMIT;
SELECT nonsense;
SELEC;
INSERT INTO d (id) VALUES (1);
\errverbose
COPY (SELECT id, t FROM d WHERE id < 4 ORDER BY id) TO STDOUT WITH (FORMAT csv, HEADER);
COPY d (id, t) FROM STDIN;
100	a
101	\N
\.
COPY d (id, t) FROM STDIN;
x	a
\.
SELECT count(*) FROM d;
\copy (SELECT id FROM d ORDER BY id LIMIT 3) TO STDOUT
\set FETCH_COUNT 7
SELECT id FROM d ORDER BY id;
\unset FETCH_COUNT
\set ON_ERROR_ROLLBACK on
BEGIN;
SELECT 1 / 0;
SELECT 'kept';
COMMIT;
\set AUTOCOMMIT off
SELECT count(*) FROM d;
ROLLBACK;
\set AUTOCOMMIT on
DO $$ BEGIN RAISE NOTICE 'seen'; END $$;
LISTEN d_news;
SELECT 1 FROM pg_notify('d_nothing', 'x');
UNLISTEN *;
PREPARE p (int) AS SELECT t FROM d WHERE id = $1;
EXECUTE p (5);
DEALLOCATE p;
BEGIN;
DECLARE c CURSOR FOR SELECT id FROM d ORDER BY id;
FETCH 3 FROM c;
MOVE 2 IN c;
FETCH 1 FROM c;
COMMIT;
SELECT format('SELECT %s', k) FROM generate_series(1, 3) k \gexec
SELECT id % 2 AS odd, id % 3 AS three, count(*) FROM d WHERE id < 10 GROUP BY 1, 2 \crosstabview
SET statement_timeout = '50ms';
SELECT pg_sleep(10);
RESET statement_timeout;
SELECT length(repeat('x', 3000000)), md5(repeat('y', 3000000));
\timing off
\encoding LATIN1
SELECT length('abc');
\encoding UTF8
\echo :SERVER_VERSION_NUM :LAST_ERROR_SQLSTATE :ROW_COUNT
DROP TABLE d;
DROP TYPE d_mood;
