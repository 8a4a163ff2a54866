use std::{collections::BTreeSet, env, fs, path::Path};

use api::{Copied, Ended, ForkWish, Forked, ForkedVm, Memory, Place, Placement, Platforms, State, Vm, Vms};
use cluster::{
    member::{Load, Member, Ready},
    placement::{Explanation, Obstacle, Policy, Reason, Score, Wish},
};
use serde::Serialize;
use serde_json::{Value, json};
use types::{CopySpec, Locality, VmShape};
use uuid::Uuid;

use super::*;
use crate::clone::{Missing, Need, Order, Stage};

/// Set to have the file in the repository written anew.
const WRITE: &str = "HOST_VMM_WRITE_OPENAPI";

#[test]
fn the_repository_has_this_description() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../openapi.json");
    let text = describe().to_pretty_json().unwrap() + "\n";
    if env::var_os(WRITE).is_some() {
        fs::write(&path, &text).unwrap();
    }
    let written = fs::read_to_string(&path).unwrap();
    assert!(written == text, "{} is of another API: run this test with {WRITE}=1", path.display());
}

#[test]
fn each_operation_has_a_name_of_its_own() {
    let description = serde_json::to_value(describe()).unwrap();
    let paths = description["paths"].as_object().unwrap();
    let operations = paths.values().flat_map(|item| item.as_object().unwrap().values());
    let names: Vec<&str> = operations.map(|operation| operation["operationId"].as_str().unwrap()).collect();
    assert_eq!(names.iter().collect::<BTreeSet<_>>().len(), names.len(), "{names:?}");
    assert!(paths.keys().all(|path| path.starts_with("/v1/")));
}

#[test]
fn nobody_is_sent_to_the_source_code() {
    let text = describe().to_json().unwrap();
    assert!(!text.contains("[`") && !text.contains("::"), "{text}");
}

/// Why a value is not as a schema says, if it is not.
fn misfit(value: &Value, schema: &Value, all: &Value) -> Option<String> {
    if let Some(name) = schema["$ref"].as_str() {
        return misfit(value, all.pointer(name.strip_prefix('#')?).unwrap(), all);
    }
    if let Some(choices) = schema["oneOf"].as_array() {
        let fitting = choices.iter().filter(|choice| misfit(value, choice, all).is_none()).count();
        return (fitting != 1).then(|| format!("{value} fits {fitting} of {choices:?}"));
    }
    if let Some(parts) = schema["allOf"].as_array() {
        return parts.iter().find_map(|part| misfit(value, part, all));
    }
    let kind = match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(_) => "integer",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    };
    let kinds = [&schema["type"]].into_iter().chain(schema["type"].as_array().into_iter().flatten());
    if !kinds.into_iter().any(|known| known == kind) {
        return Some(format!("{value} is no {}", schema["type"]));
    }
    if let Some(names) = schema["enum"].as_array().filter(|names| !names.contains(value)) {
        return Some(format!("{value} is none of {names:?}"));
    }
    if let Some(items) = value.as_array() {
        return items.iter().find_map(|item| misfit(item, &schema["items"], all));
    }
    let fields = value.as_object()?;
    let required = schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str);
    let lacking = required.into_iter().find(|name| !fields.contains_key(*name));
    lacking.map(|name| format!("{value} lacks {name}")).or_else(|| {
        let known = schema["properties"].as_object();
        fields.iter().find_map(|(name, field)| match known.and_then(|known| known.get(name)) {
            Some(schema) => misfit(field, schema, all),
            None => None,
        })
    })
}

#[track_caller]
fn assert_fits(name: &str, example: &impl Serialize) {
    let all = serde_json::to_value(describe()).unwrap();
    let schema = json!({ "$ref": format!("#/components/schemas/{name}") });
    assert_eq!(misfit(&serde_json::to_value(example).unwrap(), &schema, &all), None);
}

fn member() -> Member {
    let ready = vec![Ready { config: VmShape { ram_bytes: 1 << 30, vcpus: 2 }, shells: 3 }];
    Member {
        name: "north".into(),
        cluster: "production".into(),
        address: "192.0.2.1:7070".parse().unwrap(),
        labels: [("zone".to_owned(), "north".to_owned())].into(),
        cpu_profile: String::new(),
        load: Load { ready, images: vec![Uuid::from_u128(1)], ..Load::default() },
    }
}

#[test]
fn what_is_said_of_vms_fits() {
    let vm = |state, missing_bytes: Option<u64>, memory: Option<Memory>| Vm {
        id: Uuid::from_u128(1),
        name: "web.1".into(),
        vm_type: "web".into(),
        parent: memory.map(|_| Uuid::from_u128(2)),
        generation: 1,
        state,
        pid: 4711,
        uptime_ms: 1,
        vcpus: 1,
        ram_bytes: u64::MAX,
        sealed: missing_bytes.map(|_| false),
        generation_id: memory.map(|_| true),
        missing_bytes,
        memory,
    };
    let memory = Memory { private_bytes: 1, shared_bytes: 2, proportional_bytes: 3 };
    let vms = vec![vm(State::Dependent, Some(4096), Some(memory)), vm(State::Launching, None, None)];
    let ended =
        vec![Ended { id: Uuid::from_u128(2), name: "vm".into(), parent: None, why: Some("a reason".into()) }];
    assert_fits("Vms", &Vms { vms, ended });
    assert_fits("Version", &own_version());
    let copy = |platform: &str, placement| ForkedVm {
        id: Uuid::from_u128(3),
        name: "web.2".into(),
        index: 1,
        platform: platform.into(),
        placement,
    };
    assert_fits(
        "Forked",
        &Forked { vms: vec![copy("", Placement::Local), copy("south", Placement::Remote)] },
    );
    assert_fits("ForkWish", &ForkWish { count: 2, location: Locality::Local });
    assert_fits("Failure", &Failure { error: "no".into() });
    assert_fits("Place", &Place { path: "/image".into(), compress: true });
}

#[test]
fn what_is_said_of_platforms_fits() {
    assert_fits("Member", &member());
    let platforms = vec![api::Platform { member: member(), age_ms: 5 }];
    assert_fits("Platforms", &Platforms { platforms, partitioned: false });
    let wish = Wish {
        vm_type: "web".into(),
        count: 1,
        config: VmShape { ram_bytes: 1 << 30, vcpus: 1 },
        location: Locality::Remote,
        images: vec![Uuid::from_u128(1)],
        source: "north".into(),
    };
    assert_fits("Wish", &wish);
    let reason = |obstacle, score| Reason { platform: "north".into(), copies: 1, room: 1, obstacle, score };
    let obstacle = Obstacle { cause: cluster::placement::Cause::CpuProfile, text: "another".into() };
    let platforms = vec![reason(Some(obstacle), None), reason(None, Some(Score::default()))];
    let policy = Policy::LeastLoaded;
    assert_fits(
        "Explanation",
        &Explanation { vm_type: "web".into(), count: 1, policy, placed: true, platforms },
    );
}

#[test]
fn what_is_said_of_clones_fits() {
    let slots = vec![CopySpec { id: Uuid::from_u128(1), index: 1 }];
    assert_fits("Order", &Order { source: "north".into(), slots, total: 1, lazy: true });
    assert_fits("Need", &Need { chunks: vec![3, 1], urgent: true });
    assert_fits("Missing", &Missing { chunks: vec![0..1, 4..7] });
    let vms = vec![Copied { id: Uuid::from_u128(1), name: "web.1".into() }];
    for stage in
        [Stage::Reserved, Stage::Prepared, Stage::Committed { vms }, Stage::Aborted { why: "no".into() }]
    {
        assert_fits("Stage", &stage);
    }
}

#[test]
fn what_does_not_fit_is_told() {
    let all = serde_json::to_value(describe()).unwrap();
    let schema = json!({ "$ref": "#/components/schemas/Copied" });
    let id = Uuid::from_u128(1);
    for (value, fits) in [
        (json!({ "id": id, "name": "web.1" }), true),
        (json!({ "id": id }), false),
        (json!({ "id": id, "name": 1 }), false),
        (json!([]), false),
    ] {
        assert_eq!(misfit(&value, &schema, &all).is_none(), fits, "{value}");
    }
}
