// pgjdbc: simple and extended, server-prepared after the fifth use, fetch sizes, batches, COPY, LISTEN, autosave.

import java.io.StringReader;
import java.io.StringWriter;
import java.sql.*;
import java.util.ArrayList;
import java.util.List;
import java.util.Properties;
import org.postgresql.PGConnection;
import org.postgresql.PGNotification;
import org.postgresql.copy.CopyManager;

public class Pgjdbc {
    static void say(Object... words) {
        StringBuilder line = new StringBuilder();
        for (Object word : words) line.append(word).append(' ');
        System.out.println(line.toString().trim());
    }

    interface Work { Object run() throws Exception; }

    static void fails(String what, Work work) throws Exception {
        try {
            say(what, "went well", work.run());
        } catch (SQLException error) {
            say(what, error.getSQLState(), error.getMessage().split("\n")[0]);
        }
    }

    static Connection connect(String... more) throws Exception {
        Properties properties = new Properties();
        properties.setProperty("user", System.getenv("PGUSER"));
        properties.setProperty("password", System.getenv("PGPASSWORD"));
        properties.setProperty("ApplicationName", "pgjdbc");
        for (int at = 0; at < more.length; at += 2) properties.setProperty(more[at], more[at + 1]);
        String url = "jdbc:postgresql://" + System.getenv("PGHOST") + ":" + System.getenv("PGPORT") + "/" + System.getenv("PGDATABASE");
        return DriverManager.getConnection(url, properties);
    }

    static String rows(ResultSet set) throws Exception {
        List<String> rows = new ArrayList<>();
        int columns = set.getMetaData().getColumnCount();
        while (set.next()) {
            StringBuilder row = new StringBuilder();
            for (int at = 1; at <= columns; at++) {
                Object value = set.getObject(at);
                row.append(at > 1 ? "," : "").append(value instanceof byte[] bytes ? java.util.Arrays.toString(bytes) : set.getString(at));
            }
            rows.add(row.toString());
        }
        return rows.toString();
    }

    public static void main(String[] arguments) throws Exception {
        for (String mode : new String[] {"extended", "simple", "extendedForPrepared"}) {
            Connection connection = connect("preferQueryMode", mode);
            say("mode", mode, connection.getMetaData().getDatabaseProductVersion());
            Statement statement = connection.createStatement();
            statement.execute("SET client_min_messages = warning; DROP TABLE IF EXISTS d; CREATE TABLE d (id int PRIMARY KEY, t text, n numeric(12,4), at timestamp, y bytea)");
            PreparedStatement insert = connection.prepareStatement("INSERT INTO d VALUES (?, ?, ?, ?, ?)");
            for (int key = 0; key < 30; key++) {
                insert.setInt(1, key);
                insert.setString(2, "row \u00e4 " + key);
                insert.setBigDecimal(3, new java.math.BigDecimal("1.2500"));
                insert.setTimestamp(4, Timestamp.valueOf("2024-02-29 12:34:56"));
                if (mode.equals("simple")) insert.setNull(5, Types.BINARY); // the driver of Debian 12 writes bytes there that no server accepts
                else insert.setBytes(5, new byte[] {0, (byte) 255, (byte) key});
                if (key < 10) insert.executeUpdate(); else insert.addBatch();
            }
            say("batch", insert.executeBatch().length);
            PreparedStatement read = connection.prepareStatement("SELECT id, t, n, at, y FROM d WHERE id = ?");
            for (int key = 0; key < 8; key++) { // binary and server-prepared from the fifth on
                read.setInt(1, key);
                say("prepared", rows(read.executeQuery()));
            }
            say("several", statement.execute("SELECT 1; SELECT 2"), rows(statement.getResultSet()), statement.getMoreResults(), rows(statement.getResultSet()));
            for (String text : new String[] {"SELECT nonsense", "SELEC", "SELECT 1 / 0", "INSERT INTO d (id) VALUES (1)"}) fails(text, () -> statement.execute(text));
            connection.setAutoCommit(false);
            Statement portal = connection.createStatement();
            portal.setFetchSize(7);
            ResultSet set = portal.executeQuery("SELECT id FROM d ORDER BY id");
            Statement between = connection.createStatement();
            int sum = 0;
            while (set.next()) {
                sum += set.getInt(1);
                if (set.getInt(1) == 9) say("between", rows(between.executeQuery("SELECT count(*) FROM d")));
            }
            say("fetched", sum);
            Savepoint savepoint = connection.setSavepoint("s");
            fails("in a transaction", () -> between.execute("SELECT 1 / 0"));
            fails("aborted", () -> between.execute("SELECT 1"));
            connection.rollback(savepoint);
            say("after", rows(between.executeQuery("SELECT 'usable'")));
            connection.commit();
            connection.setAutoCommit(true);
            CopyManager copy = ((PGConnection) connection).getCopyAPI();
            StringBuilder lines = new StringBuilder();
            for (int key = 1000; key < 4000; key++) lines.append(key).append("\tcopied\n");
            say("copied", copy.copyIn("COPY d (id, t) FROM STDIN", new StringReader(lines.toString())));
            fails("copy of a wrong row", () -> copy.copyIn("COPY d (id) FROM STDIN", new StringReader("x\n")));
            StringWriter out = new StringWriter();
            say("copied out", copy.copyOut("COPY (SELECT id, t FROM d WHERE id BETWEEN 998 AND 1003 ORDER BY id) TO STDOUT", out), out.toString().replace('\n', ';'));
            statement.execute("LISTEN news");
            try (Connection other = connect()) {
                other.createStatement().execute("NOTIFY news, 'one'");
                other.createStatement().execute("NOTIFY news, 'zwei'");
            }
            List<String> heard = new ArrayList<>();
            for (int turn = 0; heard.size() < 2 && turn < 60; turn++) {
                PGNotification[] all = ((PGConnection) connection).getNotifications(500);
                if (all != null) for (PGNotification one : all) heard.add(one.getName() + ":" + one.getParameter());
            }
            say("notified", heard);
            Thread canceller = new Thread(() -> {
                try {
                    Thread.sleep(400);
                    statement.cancel();
                } catch (Exception error) {
                    say("cannot cancel", error);
                }
            });
            canceller.start();
            fails("cancelled", () -> statement.execute("SELECT pg_sleep(60)"));
            canceller.join();
            String large = "0123456789".repeat(300_000);
            PreparedStatement big = connection.prepareStatement("SELECT ?::text, md5(?)");
            big.setString(1, large);
            big.setString(2, large);
            ResultSet answer = big.executeQuery();
            answer.next();
            say("large", answer.getString(1).equals(large), answer.getString(2));
            statement.execute("DROP TABLE d");
            connection.close();
        }
        Connection saved = connect("autosave", "always");
        saved.setAutoCommit(false);
        fails("autosave", () -> saved.createStatement().execute("SELECT 1 / 0"));
        say("goes on", rows(saved.createStatement().executeQuery("SELECT 1")));
        saved.rollback();
        saved.close();
    }
}
