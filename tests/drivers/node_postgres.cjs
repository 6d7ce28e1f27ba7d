// node-postgres: simple and extended, named statements, cursors, COPY streams, LISTEN, a pool.
'use strict';
const { Client, Pool } = require('pg');
const Cursor = require('pg-cursor');
const { from: copyFrom, to: copyTo } = require('pg-copy-streams');
const { pipeline } = require('node:stream/promises');
const { Readable } = require('node:stream');

const say = (what, ...words) => console.log(what, ...words.map((word) => JSON.stringify(word)));
const fails = async (what, work) => {
  try { say(what, 'went well', (await work).rows); } catch (error) { say(what, error.code, error.severity, error.message, error.position); }
};

async function main() {
  const client = new Client({ application_name: 'node' });
  const notices = [];
  client.on('notice', (notice) => notices.push([notice.severity, notice.message]));
  await client.connect();
  await client.query('SET client_min_messages = warning; DROP TABLE IF EXISTS d; CREATE TABLE d (id int PRIMARY KEY, t text, j jsonb)');
  const several = await client.query('SELECT 1 AS a; SELECT 2 AS b, 3 AS c');
  say('several', several.map((one) => one.rows));
  const values = [42, '1099511627776', 1.5, 'wörd 😀', Buffer.from([0, 255]), true, null, [1, null, 3], ['a', 'b"'], { a: [1] }, new Date(0)];
  const types = ['int', 'bigint', 'float8', 'text', 'bytea', 'bool', 'text', 'int[]', 'text[]', 'jsonb', 'timestamptz'];
  for (const binary of [false, true]) {
    for (let at = 0; at < values.length; at++) {
      if (binary && at > 3) continue;
      const result = await client.query({ text: `SELECT $1::${types[at]} AS v`, values: [values[at]], binary });
      say('type', types[at], binary, result.rows, result.fields.map((field) => [field.name, field.dataTypeID, field.format]));
    }
  }
  for (let key = 0; key < 6; key++) {
    say('named', (await client.query({ name: 'twice', text: 'SELECT $1::int * 2 AS v', values: [key] })).rows);
  }
  await fails('another text under the same name', client.query({ name: 'twice', text: 'SELECT 1', values: [] }));
  const queued = [];
  for (let key = 0; key < 30; key++) queued.push(client.query('INSERT INTO d (id, t) VALUES ($1, $2) RETURNING id', [key, `row ${key}`]));
  say('queued', (await Promise.all(queued)).map((one) => one.rows[0].id));
  say('rows', (await client.query({ text: 'SELECT id, t FROM d ORDER BY id LIMIT 3', rowMode: 'array' })).rows);
  for (const text of ['SELECT nonsense', 'SELEC', 'SELECT 1 / 0', 'SELECT * FROM nowhere', '']) await fails(text, client.query(text));
  await fails('unique', client.query('INSERT INTO d (id) VALUES ($1)', [1]));
  await client.query('BEGIN');
  await fails('in a transaction', client.query('SELECT 1 / $1::int', [0]));
  await fails('aborted', client.query('SELECT 1'));
  await client.query('ROLLBACK');
  const cursor = client.query(new Cursor('SELECT id FROM d ORDER BY id'));
  const parts = [];
  for (;;) {
    const rows = await cursor.read(7);
    if (rows.length === 0) break;
    parts.push(rows.length);
  }
  await cursor.close();
  say('cursor', parts);
  const early = client.query(new Cursor('SELECT generate_series(1, 100000)'));
  say('early', (await early.read(3)).length);
  await early.close();
  const lines = Array.from({ length: 3000 }, (_, key) => `${key + 1000}\tcopied ${'x'.repeat(50)}\n`);
  await pipeline(Readable.from(lines), client.query(copyFrom('COPY d (id, t) FROM STDIN')));
  try {
    await pipeline(Readable.from(['x\ty\n']), client.query(copyFrom('COPY d (id, t) FROM STDIN')));
  } catch (error) { say('copy of a wrong row', error.code); }
  let bytes = 0;
  for await (const chunk of client.query(copyTo('COPY (SELECT * FROM d ORDER BY id) TO STDOUT'))) bytes += chunk.length;
  say('copied', bytes, (await client.query('SELECT count(*) FROM d')).rows);
  const heard = [];
  const both = new Promise((resolve) => client.on('notification', (one) => { heard.push([one.channel, one.payload]); if (heard.length === 2) resolve(); }));
  await client.query('LISTEN news');
  const other = new Client();
  await other.connect();
  for (const payload of ['one', 'zwei ä']) await other.query('SELECT pg_notify($1, $2)', ['news', payload]);
  await both;
  say('notified', heard);
  await client.query("SET client_min_messages = notice; DO $$ BEGIN RAISE NOTICE 'seen'; END $$");
  say('notices', notices);
  const sleeping = client.query('SELECT pg_sleep(60)').catch((error) => error.code);
  await new Promise((resolve) => setTimeout(resolve, 400));
  const pid = (await client.constructor, client.processID);
  const canceller = new Client();
  canceller.cancel(client, client.activeQuery || client._activeQuery || client._getActiveQuery());
  say('cancelled', await sleeping, typeof pid);
  const large = '0123456789'.repeat(300000);
  const result = await client.query('SELECT $1::text AS v, md5($1) AS m', [large]);
  say('large', result.rows[0].v === large, result.rows[0].m, (await client.query("SELECT repeat('y', 5000000) AS v")).rows[0].v.length);
  const pool = new Pool({ max: 3 });
  say('pool', (await Promise.all(Array.from({ length: 20 }, (_, key) => pool.query('SELECT $1::int AS v', [key])))).map((one) => one.rows[0].v));
  await pool.end();
  await client.query('DROP TABLE d');
  await other.end();
  await client.end();
}
main().catch((error) => { console.log('failed', error.message); process.exitCode = 1; });
