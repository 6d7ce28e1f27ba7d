//! Machines that vanish without a word: their packets stop coming, which only TCP's own timers can notice. A network
//! namespace plays the other machine; its cable is pulled.

use crate::{
    harness::{PROGRAM, Proxy, folder, section, url_text, wait_until},
    raw::{PATIENCE, Raw, Request},
    stage::Trusting,
    support::{find_client, free_port},
};
use std::{
    io::{BufRead, BufReader, Write},
    process::{Child, Command, Stdio},
    time::Duration,
};

/// A network namespace that one cable leads to; dropping it removes both.
struct Machine {
    name: String,
    cable: String,
    /// Of this end and of that one.
    here: String,
    there: String,
}

fn ip(arguments: &str) -> Result<(), String> {
    let output = Command::new("ip").args(arguments.split_whitespace()).output().map_err(|error| format!("ip: {error}"))?;
    if output.status.success() { Ok(()) } else { Err(format!("ip {arguments}: {}", String::from_utf8_lossy(&output.stderr))) }
}

impl Machine {
    fn new() -> Result<Machine, String> {
        let number = std::process::id() % 250;
        let machine = Machine {
            name: format!("und-{}", std::process::id()),
            cable: format!("und{}", std::process::id()),
            here: format!("10.213.{number}.1"),
            there: format!("10.213.{number}.2"),
        };
        let Machine { name, cable, here, there } = &machine;
        ip(&format!("netns add {name}"))?;
        ip(&format!("link add {cable} type veth peer name far netns {name}"))?;
        ip(&format!("address add {here}/30 dev {cable}"))?;
        ip(&format!("link set {cable} up"))?;
        for rest in [format!("address add {there}/30 dev far"), "link set far up".into(), "link set lo up".into()] {
            ip(&format!("-n {name} {rest}"))?;
        }
        Ok(machine)
    }

    /// A program on that machine.
    fn program(&self, name: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name, name]);
        command
    }

    fn pull_the_cable(&self) {
        ip(&format!("-n {} link set far down", self.name)).unwrap();
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = ip(&format!("link delete {}", self.cable));
        let _ = ip(&format!("netns delete {}", self.name));
    }
}

/// Ended when dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub async fn machines() {
    let machine = match Machine::new() {
        Ok(machine) => machine,
        Err(reason) => {
            // containers without NET_ADMIN: what the kernel is told is tested in net::tcp all the same
            eprintln!("    LEFT OUT: no network namespace can be made here ({reason})");
            return;
        }
    };
    let source = Trusting::start(15, &[]).await;
    source.server.create_database("shop").await.unwrap();
    let near = format!("[[database]]\nname = \"shop\"\nsource = \"{}\"\n", url_text(&source.server.superuser_url("shop")));
    // there: a proxy before the same server (through one here), so that a server of ours stands on the machine that vanishes
    let bridge = Proxy::start_at("gone-bridge", &machine.here, "", &near);
    let there = folder("gone-there");
    let port = free_port().unwrap();
    let config = there.join("proxy.toml");
    let url = format!("postgres://postgres@{}:{}/shop?sslmode=disable", machine.here, bridge.listen);
    let text = format!(
        "[proxy]\nlisten = \"{}:{port}\"\nmetadata = \"sqlite:{}/m.db\"\n[[database]]\nname = \"shop\"\nsource = \"{url}\"\n",
        machine.there,
        there.display()
    );
    std::fs::write(&config, text).unwrap();
    let log = std::fs::File::create(there.join("proxy.log")).unwrap();
    let mut command = machine.program(PROGRAM);
    command.args(["run", "--config", config.to_str().unwrap()]).stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
    let _far = Running(command.spawn().unwrap());
    wait_until("the far server answers", PATIENCE, || async { std::net::TcpStream::connect((machine.there.as_str(), port)).is_ok() }).await;

    let keepalives = "keepalives_idle=1&keepalives_interval=1&keepalives_count=2&tcp_user_timeout=2000";
    let far = format!(
        "{near}\n[[database]]\nname = \"far\"\nsource = \"postgres://postgres@{}:{port}/shop?sslmode=disable&{keepalives}\"\n",
        machine.there
    );
    let tcp = "[proxy.tcp]\nkeepalive_idle = \"1s\"\nkeepalive_interval = \"1s\"\nkeepalive_count = 2\nuser_timeout = \"2s\"\n";
    let proxy = Proxy::start_at("gone", "0.0.0.0", tcp, &far);
    let clients = async |name: &str| {
        let rows = proxy.rows("SHOW CLIENTS").await;
        rows.iter().filter(|row| row["application"] == name).count()
    };
    // one client is idle when it vanishes, one is being answered
    let mut started = Vec::new();
    for (name, then) in [("idle", ""), ("reading", "SELECT pg_sleep(0.05), repeat('x', 5000) FROM generate_series(1, 2000);\n")] {
        let mut client = machine.program(find_client("psql").unwrap().to_str().unwrap());
        let login = format!("host={} port={} dbname=shop user=app application_name={name}", machine.here, proxy.listen);
        client.args(["-X", "-A", "-t", "-d", &login]).stdin(Stdio::piped()).stdout(Stdio::piped()).env("LC_ALL", "C.UTF-8");
        let mut client = Running(client.spawn().unwrap());
        let input = client.0.stdin.as_mut().unwrap();
        writeln!(input, "SELECT 'here';").unwrap();
        input.flush().unwrap();
        let mut line = String::new();
        let mut output = BufReader::new(client.0.stdout.take().unwrap());
        output.read_line(&mut line).unwrap();
        assert_eq!(line.trim(), "here");
        client.0.stdin.as_mut().unwrap().write_all(then.as_bytes()).unwrap();
        assert_eq!(clients(name).await, 1);
        started.push((client, output));
    }
    let login: [(&[u8], &[u8]); 2] = [(b"user", b"app"), (b"database", b"far")];
    let packet = crate::raw::startup(196_608, &login);
    let (mut idle, mut waiting) = (Raw::open_with(proxy.listen, &packet).await, Raw::open_with(proxy.listen, &packet).await);
    assert_eq!(idle.value("SELECT 1").await, "1");
    waiting.send(&Request::new().query("SELECT pg_sleep(600)").0).await;
    tokio::time::sleep(Duration::from_millis(300)).await;

    machine.pull_the_cable();
    section("clients that are gone", async {
        for name in ["idle", "reading"] {
            wait_until(name, PATIENCE, || async { clients(name).await == 0 }).await;
        }
    })
    .await;
    section("servers that are gone", async {
        for raw in [&mut idle, &mut waiting] {
            raw.until_closed().await;
        }
    })
    .await;
    let mut other = Raw::open(proxy.listen, "shop").await;
    assert_eq!(other.value("SELECT 1").await, "1", "others go on");
    drop(started);
}
