//! `host-vmm ps` and `host-vmm tree`: which VMs there are, and what they take.

use std::{collections::BTreeMap, process::ExitCode, time::Duration};

use api::{Ended, Memory, State, Vm, Vms, client};
use base::text::Name;
use indicatif::FormattedDuration;
use termtree::Tree;
use uuid::Uuid;

use super::{
    asked::endpoint,
    table::{Column, json, size, table},
};
use crate::cli;

/// Prints a table of all VMs.
///
/// # Errors
/// Where no platform answers.
pub(crate) fn ps(options: &cli::Ps) -> anyhow::Result<ExitCode> {
    let vms = client::vms(endpoint(&options.platform)?.as_ref())?;
    if options.json {
        println!("{}", json(&vms)?);
    } else {
        print!("{}{}", list(&vms.vms), list_ended(&vms.ended));
    }
    Ok(ExitCode::SUCCESS)
}

/// Draws who comes from whom.
///
/// # Errors
/// Where no platform answers.
pub(crate) fn tree(options: &cli::Tree) -> anyhow::Result<ExitCode> {
    for tree in trees(&client::vms(endpoint(&options.platform)?.as_ref())?) {
        print!("{tree}");
    }
    Ok(ExitCode::SUCCESS)
}

fn list(vms: &[Vm]) -> String {
    use Column::{Numbers, Words};
    let head = [
        ("NAME", Words),
        ("TYPE", Words),
        ("GEN", Numbers),
        ("STATE", Words),
        ("PID", Numbers),
        ("UPTIME", Numbers),
        ("VCPUS", Numbers),
        ("RAM", Numbers),
        ("SEALED", Words),
        ("VMGENID", Words),
        ("MISSING", Numbers),
        ("PRIVATE", Numbers),
        ("SHARED", Numbers),
    ];
    let rows = vms.iter().map(|vm| {
        let memory = |bytes: fn(&Memory) -> u64| {
            vm.memory.as_ref().map_or_else(|| "-".to_owned(), |all| size(bytes(all)))
        };
        [
            vm.name.clone(),
            vm.vm_type.clone(),
            vm.generation.to_string(),
            state(vm.state).to_owned(),
            vm.pid.to_string(),
            uptime(vm),
            vm.vcpus.to_string(),
            size(vm.ram_bytes),
            vm.sealed.map_or("-", |sealed| if sealed { "yes" } else { "no" }).to_owned(),
            generation_id(vm).to_owned(),
            vm.missing_bytes.map_or_else(|| "-".to_owned(), size),
            memory(|memory| memory.private_bytes),
            memory(|memory| memory.shared_bytes),
        ]
    });
    table(head, rows)
}

/// A line for each VM that the platform has ended for a reason of its own.
fn list_ended(ended: &[Ended]) -> String {
    let told = ended.iter().filter_map(|Ended { name, why, .. }| {
        Some(format!("{} was ended: {}\n", Name::from(name.as_str()), why.as_ref()?))
    });
    told.collect()
}

fn trees(vms: &Vms) -> Vec<Tree<String>> {
    let mut labels: BTreeMap<Uuid, String> = BTreeMap::new();
    let mut children: BTreeMap<Option<Uuid>, Vec<Uuid>> = BTreeMap::new();
    let ended = vms.ended.iter().map(|ended| {
        let why = ended.why.as_ref().map_or_else(String::new, |why| format!(": {why}"));
        (ended.id, ended.parent, format!("{} (ended{why})", Name::from(ended.name.as_str())))
    });
    for (id, parent, label) in ended.chain(vms.vms.iter().map(|vm| (vm.id, vm.parent, label(vm)))) {
        labels.insert(id, label);
        children.entry(parent).or_default().push(id);
    }
    // Of copies of an image, the parent may be long gone.
    let is_there = |parent: &Option<Uuid>| parent.is_some_and(|parent| labels.contains_key(&parent));
    let roots = children.iter().filter(|(parent, _)| !is_there(parent)).flat_map(|(_, roots)| roots);
    roots.map(|root| grow(*root, &labels, &children)).collect()
}

fn grow(
    id: Uuid,
    labels: &BTreeMap<Uuid, String>,
    children: &BTreeMap<Option<Uuid>, Vec<Uuid>>,
) -> Tree<String> {
    let leaves = children.get(&Some(id)).into_iter().flatten().map(|child| grow(*child, labels, children));
    Tree::new(labels.get(&id).cloned().unwrap_or_default()).with_leaves(leaves)
}

fn label(vm: &Vm) -> String {
    let private =
        vm.memory.map_or_else(String::new, |memory| format!(", {} of its own", size(memory.private_bytes)));
    let missing = vm.missing_bytes.map_or_else(String::new, |bytes| format!(", {} to come", size(bytes)));
    format!("{} ({} for {}{private}{missing})", Name::from(vm.name.as_str()), state(vm.state), uptime(vm))
}

fn state(state: State) -> &'static str {
    match state {
        State::Launching => "launching",
        State::Running => "running",
        State::Dependent => "dependent",
    }
}

fn generation_id(vm: &Vm) -> &'static str {
    match vm.generation_id {
        Some(true) => "yes",
        Some(false) => "no",
        None => "-",
    }
}

fn uptime(vm: &Vm) -> String {
    FormattedDuration(Duration::from_millis(vm.uptime_ms)).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vm(id: u128, parent: Option<u128>, name: &str) -> Vm {
        Vm {
            id: Uuid::from_u128(id),
            name: name.into(),
            vm_type: "web".into(),
            parent: parent.map(Uuid::from_u128),
            generation: 1,
            state: State::Running,
            pid: 4711,
            uptime_ms: 61_000,
            vcpus: 1,
            ram_bytes: 512 << 20,
            sealed: Some(true),
            generation_id: Some(true),
            missing_bytes: None,
            memory: Some(Memory { private_bytes: 3 << 20, shared_bytes: 0, proportional_bytes: 0 }),
        }
    }

    #[test]
    fn each_vm_has_a_line() {
        let text = list(&[vm(1, None, "vm"), Vm { memory: None, ..vm(2, None, "web.1") }]);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 3);
        assert!(lines[1].contains("3.00 MiB") && lines[2].ends_with('-'), "{text}");
    }

    #[test]
    fn what_has_not_come_yet_is_shown() {
        let vm = Vm { state: State::Dependent, missing_bytes: Some(5 << 20), ..vm(1, None, "web.1") };
        assert_eq!(label(&vm), "web.1 (dependent for 00:01:01, 3.00 MiB of its own, 5.00 MiB to come)");
        let text = list(&[vm]);
        assert!(text.contains("dependent") && text.contains("5.00 MiB"), "{text}");
    }

    #[test]
    fn it_is_shown_whether_memory_is_sealed_and_who_was_ended_since_it_was_not() {
        let all = [None, Some(false), Some(true)].map(|sealed| Vm { sealed, ..vm(1, None, "vm") });
        let text = list(&all);
        let at = text.find("SEALED").unwrap();
        let shown: Vec<&str> =
            text.lines().map(|line| line[at..].split_whitespace().next().unwrap()).collect();
        assert_eq!(shown, ["SEALED", "-", "no", "yes"], "{text}");
        let ended = |why: Option<&str>| Ended {
            id: Uuid::nil(),
            name: "web.1".into(),
            parent: None,
            why: why.map(Into::into),
        };
        assert_eq!(list_ended(&[ended(None), ended(Some("a reason"))]), "web.1 was ended: a reason\n");
        let hostile = Ended { name: "\x1b]2;mine\x07\n".into(), ..ended(Some("a reason")) };
        let told = list_ended(&[hostile]);
        assert!(told.trim_end().chars().all(|character| !character.is_control()), "{told:?}");
    }

    #[test]
    fn a_tree_has_the_ended_too() {
        let ended = Ended {
            id: Uuid::from_u128(2),
            name: "web.1".into(),
            parent: Some(Uuid::from_u128(1)),
            why: None,
        };
        let vms = Vms {
            vms: vec![vm(1, None, "vm"), vm(3, Some(2), "web.2"), vm(4, Some(1), "web.3")],
            ended: vec![ended],
        };
        let trees = trees(&vms);
        assert_eq!(trees.len(), 1);
        let text = trees[0].to_string();
        let names: Vec<&str> = text.lines().map(|line| line.split(" (").next().unwrap()).collect();
        assert_eq!(names, ["vm", "├── web.1", "│   └── web.2", "└── web.3"]);
    }
}
