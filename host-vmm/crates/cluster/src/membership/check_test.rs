use proptest::prelude::*;
use uuid::Uuid;

use super::*;
use crate::member::Ready;

fn member() -> Member {
    let ready = Ready { config: VmShape { ram_bytes: 512 << 20, vcpus: 2 }, shells: 4 };
    Member {
        name: "north-1".into(),
        cluster: "web".into(),
        address: "192.0.2.1:7070".parse().unwrap(),
        labels: BTreeMap::from([("example.com/zone".into(), "North, 2nd floor".into())]),
        cpu_profile: "x86-64-v3".into(),
        load: Load {
            ready: vec![ready; MAX_SHAPES],
            images: vec![Uuid::from_u128(1); MAX_IMAGES],
            ..Load::default()
        },
    }
}

/// A member that has been changed.
fn changed(change: impl FnOnce(&mut Member)) -> Member {
    let mut member = member();
    change(&mut member);
    member
}

#[test]
fn what_a_platform_says_is_understood() {
    let json = serde_json::to_vec(&member()).unwrap();
    assert_eq!(parse(&json).unwrap(), member());
    assert!(json.len() < MAX_BYTES / 2, "{} bytes", json.len());
}

#[test]
fn fields_of_later_versions_are_passed_over() {
    let mut json = serde_json::to_value(member()).unwrap();
    json["color"] = "red".into();
    json["load"]["colors"] = 3.into();
    assert_eq!(parse(json.to_string().as_bytes()).unwrap(), member());
}

#[test]
fn each_mistake_is_found() {
    let address = |text: &str| text.parse::<SocketAddr>().unwrap();
    let long = "x".repeat(MAX_LABEL_BYTES + 1);
    let label = |name: &str, value: &str| BTreeMap::from([(name.to_owned(), value.to_owned())]);
    let many = (0..=MAX_LABELS).map(|number| (number.to_string(), String::new())).collect();
    let shape = |ram_bytes, vcpus| vec![Ready { config: VmShape { ram_bytes, vcpus }, shells: 1 }];
    let mistakes = [
        (changed(|member| member.name = "North 1".into()), "\"North 1\" is no name"),
        (changed(|member| member.cluster = String::new()), "\"\" is no name"),
        (changed(|member| member.address = address("0.0.0.0:7070")), "nobody can be reached at 0.0.0.0:7070"),
        (changed(|member| member.address = address("[::]:7070")), "nobody can be reached"),
        (changed(|member| member.address = address("[ff02::1]:7070")), "nobody can be reached"),
        (changed(|member| member.address = address("255.255.255.255:7070")), "nobody can be reached"),
        (changed(|member| member.address = address("192.0.2.1:0")), "nobody can be reached"),
        (changed(|member| member.labels = many), "33 labels; at most 32"),
        (changed(|member| member.labels = label("a b", "")), "\"a b\" can't be a label"),
        (changed(|member| member.labels = label("", "")), "can't be a label"),
        (changed(|member| member.labels = label(&long, "")), "can't be a label"),
        (changed(|member| member.labels = label("a", &long)), "can't be a label"),
        (changed(|member| member.labels = label("a", "\u{1b}[2J")), "\"\\u{1b}[2J\" can't be a label"),
        (changed(|member| member.cpu_profile = "a b".into()), "can't be a label or a CPU profile"),
        (changed(|member| member.load.images.push(Uuid::nil())), "257 images; at most 256"),
        (changed(|member| member.load.ready.extend(shape(16 << 20, 1))), "33 shapes"),
        (
            changed(|member| member.load.ready = shape(16 << 20, 0)),
            "no machines with 16777216 bytes of memory and 0",
        ),
        (changed(|member| member.load.ready = shape(16 << 20, 65)), "no machines"),
        (changed(|member| member.load.ready = shape((16 << 20) + 1, 1)), "no machines"),
        (changed(|member| member.load.ready = shape(u64::MAX, 1)), "no machines"),
        (changed(|member| member.load.cpu_pressure_permille = 1001), "1001 thousandths"),
        (changed(|member| member.load.memory_pressure_permille = 1001), "1001 thousandths"),
    ];
    for (member, expected) in mistakes {
        let error = parse(&serde_json::to_vec(&member).unwrap()).unwrap_err().to_string();
        assert!(error.contains(expected), "{error:?} should have {expected:?}");
    }
    check(&member()).unwrap();
}

#[test]
fn what_is_too_long_is_not_looked_at() {
    let json = serde_json::to_string(&member()).unwrap();
    let padded = |bytes: usize| format!("{json}{}", " ".repeat(bytes - json.len()));
    parse(padded(MAX_BYTES).as_bytes()).unwrap();
    assert!(
        matches!(parse(padded(MAX_BYTES + 1).as_bytes()), Err(Error::Length(length)) if length == MAX_BYTES + 1)
    );
}

#[test]
fn messages_quote_no_more_than_the_beginning() {
    let endless = changed(|member| member.name = "é".repeat(10_000));
    let error = check(&endless).unwrap_err().to_string();
    assert_eq!(error, format!("\"{}…\" is no name", "é".repeat(62)));
    let hostile = changed(|member| member.name = "\x1b]2;x\x07".into());
    assert_eq!(check(&hostile).unwrap_err().to_string(), "\"\\u{1b}]2;x\\u{7}\" is no name");
}

proptest! {
    #[test]
    fn no_bytes_do_harm(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        prop_assert!(parse(&bytes).is_err());
    }

    #[test]
    fn no_change_of_a_valid_one_does_harm(at: prop::sample::Index, byte: u8) {
        let mut json = serde_json::to_vec(&member()).unwrap();
        let at = at.index(json.len());
        json[at] = byte;
        if let Ok(member) = parse(&json) {
            check(&member).unwrap();
        }
    }
}
