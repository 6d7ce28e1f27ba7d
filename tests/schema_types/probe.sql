-- Asks this server what ALTER COLUMN … TYPE does: the verdict for one ordered pair of types, from sample values.
CREATE OR REPLACE FUNCTION probe(old text, new text, samples text[]) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    alone boolean := false;
    before oid;
    rewritten boolean := false;
    fails int := 0;
    loses int := 0;
    value text;
    first text;
    back text;
    expression text;
    way text;
    ways text[] := ARRAY['c::%1$s', 'c::text::%1$s', 'c::numeric::%1$s', 'c::integer::%1$s',
                         'convert_from(c, ''UTF8'')::%1$s', 'regexp_replace(c::text, ''[$,]'', '''', ''g'')::%1$s'];
BEGIN
    EXECUTE format('CREATE TEMP TABLE empty (c %s) ON COMMIT DROP', old);
    before := pg_relation_filenode('empty');
    BEGIN
        EXECUTE format('ALTER TABLE empty ALTER c TYPE %s', new);
        alone := true;
        rewritten := before <> pg_relation_filenode('empty');
    EXCEPTION WHEN OTHERS THEN NULL;
    END;
    DROP TABLE IF EXISTS empty;
    IF alone AND NOT rewritten THEN RETURN 'F'; END IF;
    -- text is parsed, whatever comes out
    IF NOT alone AND old ~ '^(text|varchar|varchar\(\d+\)|char\(\d+\)|citext|varchar\(50\)\[\])$' THEN RETURN 'P'; END IF;
    -- is there an explicit cast? Otherwise the way leads through text.
    expression := format('c::%s', new);
    IF NOT alone THEN
        BEGIN
            EXECUTE format('SELECT NULL::%s::%s', old, new);
        EXCEPTION WHEN OTHERS THEN expression := format('c::text::%s', new);
        END;
    END IF;
    FOREACH value IN ARRAY samples LOOP
        BEGIN
            EXECUTE format('CREATE TEMP TABLE one (c %s)', old);
            EXECUTE format('INSERT INTO one VALUES (%L)', value);
            SELECT c::text INTO first FROM one;
            IF alone THEN
                EXECUTE format('ALTER TABLE one ALTER c TYPE %s', new);
            ELSE
                EXECUTE format('ALTER TABLE one ALTER c TYPE %s USING %s', new, expression);
            END IF;
            -- lossless: one of the ways back gives the value again
            back := NULL;
            FOREACH way IN ARRAY ways LOOP
                BEGIN
                    EXECUTE format('SELECT (' || way || ')::text FROM one', old) INTO back;
                EXCEPTION WHEN OTHERS THEN back := NULL;
                END;
                EXIT WHEN back IS NOT DISTINCT FROM first;
            END LOOP;
            IF back IS DISTINCT FROM first THEN loses := loses + 1; END IF;
            DROP TABLE one;
        EXCEPTION WHEN OTHERS THEN fails := fails + 1;
        END;
    END LOOP;
    IF alone THEN
        RETURN CASE WHEN loses > 0 THEN 'L' WHEN fails > 0 THEN 'D' ELSE 'R' END;
    END IF;
    RETURN CASE WHEN fails = cardinality(samples) THEN 'x' WHEN loses > 0 THEN 'UL' WHEN fails > 0 THEN 'UD' ELSE 'U' END;
END $$;
