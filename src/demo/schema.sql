-- The second workload's tables: the types and shapes that pgbench does not have.
CREATE TYPE mood AS ENUM ('calm', 'curious', 'überglücklich');
CREATE TYPE address AS (street text, city text, zip integer);

CREATE TABLE customer (
    id uuid PRIMARY KEY,
    name text NOT NULL,
    mood mood NOT NULL,
    home address,
    tags text[] NOT NULL,
    profile jsonb NOT NULL,
    photo bytea,
    nickname text,
    created timestamptz NOT NULL DEFAULT now(),
    seeded boolean NOT NULL DEFAULT false
);
CREATE INDEX customer_created ON customer (created);

CREATE TABLE account (
    id integer PRIMARY KEY,
    opening numeric(14, 2) NOT NULL,
    balance numeric(14, 2) NOT NULL,
    version bigint NOT NULL DEFAULT 0,
    changed timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE transfer (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    token text NOT NULL UNIQUE,
    from_account integer NOT NULL REFERENCES account,
    to_account integer NOT NULL REFERENCES account,
    amount numeric(12, 2) NOT NULL CHECK (amount > 0),
    note text NOT NULL,
    at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX transfer_from ON transfer (from_account);

-- No primary key: rows are found by all their columns.
CREATE TABLE journal (
    token text NOT NULL,
    client integer NOT NULL,
    revision integer NOT NULL,
    payload jsonb NOT NULL,
    at timestamptz NOT NULL DEFAULT clock_timestamp()
);
ALTER TABLE journal REPLICA IDENTITY FULL;
CREATE INDEX journal_token ON journal (token);

CREATE TABLE product (
    id integer PRIMARY KEY,
    name text NOT NULL,
    price numeric(10, 2) NOT NULL,
    stock integer NOT NULL DEFAULT 0,
    description text NOT NULL
);

CREATE SEQUENCE ticket_number START WITH 1000;
CREATE TABLE ticket (
    number bigint PRIMARY KEY DEFAULT nextval('ticket_number'),
    token text NOT NULL UNIQUE,
    opened timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE measurement (
    id bigserial,
    device integer NOT NULL,
    token text NOT NULL,
    value double precision NOT NULL,
    readings numeric[] NOT NULL,
    at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (id, device)
) PARTITION BY RANGE (device);
CREATE TABLE measurement_low PARTITION OF measurement FOR VALUES FROM (0) TO (50);
CREATE TABLE measurement_high PARTITION OF measurement FOR VALUES FROM (50) TO (100);
CREATE INDEX measurement_token ON measurement (token);

CREATE VIEW account_activity AS
    SELECT a.id, a.balance, count(t.id) AS transfers
    FROM account a LEFT JOIN transfer t ON t.from_account = a.id GROUP BY a.id, a.balance;

INSERT INTO account (id, opening, balance) SELECT n, 1000 + n * 0.25, 1000 + n * 0.25 FROM generate_series(1, 40) n;
INSERT INTO product (id, name, price, description)
    SELECT n, 'Zubehör ' || n || ' 部品', (n * 37 % 10000) / 100.0, repeat('beschreibung ', n % 40) FROM generate_series(1, 1000) n;
INSERT INTO customer (id, name, mood, home, tags, profile, photo, nickname, seeded)
    SELECT md5('customer' || n)::uuid, 'Кунде ' || n, (enum_range(NULL::mood))[1 + n % 3], ROW('Straße ' || n, 'Zürich', 8000 + n)::address,
           ARRAY['tag' || n % 7, 'größe'], jsonb_build_object('revision', 0, 'scores', jsonb_build_array(n, n * 2)),
           decode(repeat(md5(n::text), 40), 'hex'), 'nick' || n, true
    FROM generate_series(1, 300) n;
