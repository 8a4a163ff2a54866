use cluster::settings::{EtcdTls, Login};
use proptest::prelude::*;

use super::*;

/// What most files begin with: a platform that others can reach.
const LISTEN: &str = "listen = '192.0.2.1:7070'\ntls = { ca = 'ca.pem', cert = 'c.pem', key = 'c.key' }\n";

fn parse(text: &str) -> Result<PlatformConfig, Error> {
    PlatformConfig::parse(text, Path::new("/etc/host-vmm/platform.toml"), "north-1")
}

/// What is said about a mistake, with all that is behind it.
fn mistake(text: &str) -> String {
    base::error::chain(&parse(text).unwrap_err())
}

fn address(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

#[test]
fn the_example_is_valid_and_has_every_field() {
    let example = include_str!("../../../../platform.example.toml");
    let config = parse(example).unwrap();
    assert_eq!((config.name.as_str(), config.cluster.as_str()), ("north-1", "web"));
    assert_eq!(config.etcd.unwrap().servers.len(), 3);
    // What is commented out is valid too, in place of its neighbours.
    let uncommented = example.lines().map(|line| match line.strip_prefix("# ") {
        Some(rest) if rest.contains(" = ") && rest.split(' ').nth(1) == Some("=") => rest,
        _ => line,
    });
    let fields: toml::Table = uncommented
        .filter(|line| !line.starts_with("cluster = \"etcd"))
        .map(|line| format!("{line}\n"))
        .collect::<String>()
        .parse()
        .unwrap();
    let known = mistake("nonsense = 1");
    for field in known.split('`').skip(3).step_by(2) {
        assert!(fields.contains_key(field), "the example has no {field}: {known}");
    }
    for field in fields.keys() {
        assert!(known.contains(&format!("`{field}`")), "{field} is not known");
    }
}

#[test]
fn a_file_may_be_empty() {
    let expected = PlatformConfig {
        name: "north-1".into(),
        listen: None,
        tls: None,
        api: None,
        cluster: "default".into(),
        etcd: None,
        peers: Vec::new(),
        labels: BTreeMap::new(),
        cpu_profile: None,
        cpu_profile_file: None,
        lease: Duration::from_secs(10),
        log_dir: "host-vmm.logs".into(),
        events: None,
        max_vms: 1100,
        max_pause: Duration::from_secs(10),
        ready: 4,
        prefetch: true,
        limits: Vec::new(),
        keep: Vec::new(),
        image_memory: None,
        sending: Sending::default(),
        placement: toml::Table::new(),
    };
    assert_eq!(parse("").unwrap(), expected);
}

#[test]
fn a_file_is_taken_as_it_says() {
    let config = parse(&format!(
        "{LISTEN}name = 'south'\ncluster = 'etcd://192.0.2.5:2379,[2001:db8::1]:2379/db'\nlease_seconds = 3\nready = 0\n\
         prefetch = false\nmax_vms = 5\nmax_pause_seconds = 7\ncpu_profile = 'v3'\ncpu_profile_file = 'v3.json'\nlabels = {{ zone = 'south' }}\nlimits = ['web:children=8']\n\
         keep = ['web:2', '*']\nimage_memory = '3G'\nclone = {{ lazy = true, bandwidth = 7000000, orders = 'platforms' }}\nevents = 'events.json'\napi = '/run/api.sock'\nplacement = {{ web = {{ zone = 'north' }} }}\n\
         etcd = {{ ca = 'e.pem', cert = 'p.pem', key = '../p.key', user = 'u', password_file = '/run/p' }}\n\
         peers = [{{ name = 'a', address = '192.0.2.7:1' }}, {{ name = 'a', address = '192.0.2.8:1', cluster = 'web' }}]"
    ));
    let config = config.unwrap();
    let folder = Path::new("/etc/host-vmm");
    assert_eq!(config.listen, Some(address("192.0.2.1:7070")));
    let tls = Tls { ca: folder.join("ca.pem"), cert: folder.join("c.pem"), key: folder.join("c.key") };
    assert_eq!(config.tls, Some(tls));
    let etcd_tls = EtcdTls {
        ca: folder.join("e.pem"),
        identity: Some((folder.join("p.pem"), folder.join("../p.key"))),
        login: Some(Login { user: "u".into(), password_file: "/run/p".into() }),
    };
    let servers = vec![address("192.0.2.5:2379"), address("[2001:db8::1]:2379")];
    assert_eq!((config.cluster.as_str(), config.etcd), ("db", Some(Etcd { servers, tls: Some(etcd_tls) })));
    let peer =
        |cluster: &str, at: &str| Peer { name: "a".into(), cluster: cluster.into(), address: address(at) };
    assert_eq!(config.peers, [peer("db", "192.0.2.7:1"), peer("web", "192.0.2.8:1")]);
    assert_eq!((config.lease, config.ready, config.max_vms), (Duration::from_secs(3), 0, 5));
    assert_eq!(config.max_pause, Duration::from_secs(7));
    assert_eq!((config.prefetch, config.cpu_profile.as_deref()), (false, Some("v3")));
    assert_eq!(config.cpu_profile_file, Some(folder.join("v3.json")));
    assert_eq!(config.limits, ["web:children=8".parse::<Limit>().unwrap()]);
    assert_eq!(config.keep, ["web:2", "*"].map(|keep| keep.parse::<Keep>().unwrap()));
    assert_eq!(config.image_memory, Some(3 << 30));
    assert_eq!((config.events, config.api), (Some(folder.join("events.json")), Some("/run/api.sock".into())));
    assert_eq!(
        config.sending,
        Sending { lazy: true, connections: CONNECTIONS, bandwidth: 7_000_000, orders: Orders::Platforms }
    );
    assert!(config.placement["web"].is_table());
}

#[test]
fn within_one_host_there_need_be_no_certificates() {
    let config = "listen = '127.0.0.1:0'\nplaintext = true\npeers = [{ name = 'a', address = '[::1]:7070' }]";
    let config = parse(config).unwrap();
    assert_eq!((config.listen, config.tls), (Some(address("127.0.0.1:0")), None));
}

/// The text, behind what a platform needs that listens.
fn listening(text: &str) -> String {
    format!("{LISTEN}{text}")
}

/// Texts, and all that must be said about each: the field, what is wrong, what would be right.
fn each_is_told<const N: usize>(mistakes: [(String, [&str; 3]); N]) {
    for (text, expected) in mistakes {
        let told = mistake(&text);
        assert!(told.starts_with("/etc/host-vmm/platform.toml: "), "{told}");
        for expected in expected {
            assert!(told.contains(expected), "{text}\n{told:?} should have {expected:?}");
        }
    }
}

#[test]
fn each_mistake_about_the_cluster_is_told_with_its_field_and_what_would_be_right() {
    each_is_told([
        ("name = 'North'".into(), ["name: ", "\"North\" is no name", "1 to 32 characters"]),
        ("listen = 'north:7070'".into(), ["listen: ", "\"north:7070\" is no address", "statically linked"]),
        (
            "listen = '0.0.0.0:7070'".into(),
            ["listen: ", "0.0.0.0:7070", "by which the others reach this host"],
        ),
        ("listen = '192.0.2.1:7070'".into(), ["tls: ", "strangers", "ca = "]),
        ("peers = [{ name = 'a', address = '192.0.2.1:1' }]".into(), ["tls: ", "strangers", "ca = "]),
        (
            "listen = '192.0.2.1:7070'\nplaintext = true".into(),
            ["plaintext: ", "192.0.2.1:7070 is reached", "127.0.0.1"],
        ),
        (
            "plaintext = true\npeers = [{ name = 'a', address = '192.0.2.1:1' }]".into(),
            ["plaintext: ", "192.0.2.1:1 is reached", "127.0.0.1"],
        ),
        (listening("plaintext = true"), ["plaintext: ", "contradicts tls", "one of both"]),
        (listening("cluster = 'Web'"), ["cluster: ", "\"Web\" is no name", "1 to 32"]),
        (listening("cluster = 'http://192.0.2.1:1/web'"), ["cluster: ", "of a kind", "etcd://HOST:PORT"]),
        (listening("cluster = 'etcd://192.0.2.1:1'"), ["cluster: ", "names no cluster", "etcd://HOST:PORT"]),
        (listening("cluster = 'etcd://192.0.2.1:1/'"), ["cluster: ", "\"\" is no name", "1 to 32"]),
        (
            listening("cluster = 'etcd://node1:2379/web'"),
            ["cluster: ", "\"node1:2379\" is no", "statically linked"],
        ),
        (listening("cluster = 'etcd://192.0.2.1/web'"), ["cluster: ", "\"192.0.2.1\" is no", "and a port"]),
        (
            listening("cluster = 'etcd://192.0.2.1:0/web'"),
            ["cluster: ", "192.0.2.1:0 leads nowhere", "server"],
        ),
        (
            listening(&format!("cluster = 'etcd://192.0.2.1:1{}/web'", ",192.0.2.1:1".repeat(8))),
            ["cluster: ", "9 servers", "HOST:PORT"],
        ),
        ("cluster = 'etcd://192.0.2.1:1/web'".into(), ["listen: ", "must be reached", "192.0.2.1:7070"]),
        (listening("etcd = { ca = 'e' }"), ["etcd: ", "not kept by an etcd", "etcd://"]),
        (
            listening("cluster = 'etcd://192.0.2.1:1/web'\netcd = { ca = 'e', cert = 'c' }"),
            ["etcd: ", "one of cert and key", "both"],
        ),
        (
            listening("cluster = 'etcd://192.0.2.1:1/web'\netcd = { ca = 'e', user = 'c' }"),
            ["etcd: ", "one of user and password_file", "both"],
        ),
    ]);
}

#[test]
fn each_mistake_about_peers_and_the_platform_is_told_with_its_field_and_what_would_be_right() {
    each_is_told([
        (
            listening("peers = [{ name = 'A', address = '192.0.2.1:1' }]"),
            ["peers[0].name: ", "\"A\"", "1 to 32"],
        ),
        (
            listening("peers = [{ name = 'a', address = '192.0.2.1:1', cluster = '-' }]"),
            ["peers[0].cluster: ", "\"-\"", "1 to 32"],
        ),
        (
            listening("peers = [{ name = 'a', address = 'a:1' }]"),
            ["peers[0].address: ", "\"a:1\"", "such as 192.0.2.1"],
        ),
        (
            listening("peers = [{ name = 'a', address = '192.0.2.1:0' }]"),
            ["peers[0].address: ", "nowhere", "listens"],
        ),
        (
            listening(
                "peers = [{ name = 'a', address = '192.0.2.1:1' }, { name = 'a', address = '192.0.2.2:1' }]",
            ),
            ["peers[1].name: ", "already", "one entry"],
        ),
        ("labels = { 'a b' = '' }".into(), ["labels: ", "\"a b\"", "1 to 63 characters"]),
        ("cpu_profile = ''".into(), ["cpu_profile: ", "\"\" is no name", "1 to 63 characters"]),
        ("lease_seconds = 2".into(), ["lease_seconds: ", "2 is out of range", "from 3 to 60"]),
        ("lease_seconds = 61".into(), ["lease_seconds: ", "61 is out of range", "from 3 to 60"]),
        ("max_pause_seconds = 0".into(), ["max_pause_seconds: ", "0 is out of range", "from 1 to 600"]),
        ("image_memory = '1T'".into(), ["image_memory: ", "no size", "8G"]),
        ("max_vms = 0".into(), ["max_vms: ", "no room", "1 or more"]),
        (
            "limits = ['*:rate=1', 'web']".into(),
            ["limits[1]: ", "\"web\": must be TYPE:NAME=VALUE", "--limit"],
        ),
        ("keep = ['web:0']".into(), ["keep[0]: ", "TYPE:NUMBER", "--keep"]),
    ]);
}

#[test]
fn what_is_no_such_file_is_told_with_its_line() {
    for (text, line, expected) in [
        ("ready = 1\nraedy = 2", "raedy = 2", "unknown field `raedy`, expected one of "),
        ("ready = -1", "ready = -1", "integer `-1`"),
        ("plaintext = 'yes'", "plaintext = 'yes'", "expected a boolean"),
        ("tls = { ca = 'a', cert = 'b' }", "tls = ", "missing field `key`"),
        ("tls = { ca = 'a', cert = 'b', key = 'c', extra = 1 }", "tls = ", "unknown field `extra`"),
        ("[[peers]]\naddress = '192.0.2.1:1'", "[[peers]]", "missing field `name`"),
        ("name = ", "name = ", "TOML parse error"),
    ] {
        let told = mistake(text);
        assert!(told.starts_with("/etc/host-vmm/platform.toml is not valid: "), "{told}");
        assert!(told.contains(line) && told.contains(expected), "{told}");
    }
}

#[test]
fn too_many_peers_are_not_taken() {
    let peers =
        |count| (0..count).map(|number| format!("[[peers]]\nname = 'p{number}'\naddress = '192.0.2.1:1'\n"));
    let file = |count| LISTEN.to_owned() + &peers(count).collect::<String>();
    assert_eq!(parse(&file(MAX_PEERS)).unwrap().peers.len(), MAX_PEERS);
    assert!(mistake(&file(MAX_PEERS + 1)).contains("peers: there are 257 of them; at most 256"));
}

#[test]
fn a_host_whose_name_is_none_needs_one() {
    let parse = |text| PlatformConfig::parse(text, Path::new("platform.toml"), "north-1.example.com");
    let told = parse("").unwrap_err().to_string();
    assert!(
        told.starts_with("platform.toml: name: it is not given") && told.contains("north-1.example.com"),
        "{told}"
    );
    assert_eq!(parse("name = 'north-1'").unwrap().name, "north-1");
}

#[test]
fn a_file_is_read_and_one_that_is_missing_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("platform.toml");
    let missing = PlatformConfig::load(&path).unwrap_err();
    assert_eq!(missing.to_string(), format!("can't read {}", path.display()));
    fs::write(&path, "name = 'south'\nevents = 'events.json'").unwrap();
    let config = PlatformConfig::load(&path).unwrap();
    assert_eq!((config.name.as_str(), config.events), ("south", Some(folder.path().join("events.json"))));
}

proptest! {
    #[test]
    fn no_value_does_harm(
        field in prop::sample::select(vec!["name", "listen", "cluster", "cpu_profile", "api"]),
        value in "[ -&(-~é]{0,40}|etcd://[0-9.,:/a-z\\[\\]]{0,40}",
    ) {
        if let Ok(config) = parse(&format!("{LISTEN}{field} = '{value}'")) {
            prop_assert!(is_vm_type(&config.name) && is_vm_type(&config.cluster));
        }
    }
}
