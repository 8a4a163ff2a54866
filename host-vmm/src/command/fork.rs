//! `host-vmm fork`: copies of a VM that has not asked for them.

use std::process::ExitCode;

use api::{ForkWish, Forked, Placement, client};

use super::{
    asked::endpoint,
    table::{Column, json, table},
};
use crate::cli;

/// Forks a VM.
///
/// # Errors
/// Where no platform answers, or the VM can't be forked.
pub(crate) fn fork(options: &cli::Fork) -> anyhow::Result<ExitCode> {
    let wish = ForkWish { count: options.count, location: options.location.into() };
    let forked = client::fork(endpoint(&options.platform)?.as_ref(), &options.vm, &wish)?;
    print_forked(&forked, options.json)
}

/// Says which copies were made.
pub(super) fn print_forked(forked: &Forked, as_json: bool) -> anyhow::Result<ExitCode> {
    if as_json {
        println!("{}", json(forked)?);
    } else {
        print!("{}", list(forked));
    }
    Ok(ExitCode::SUCCESS)
}

fn list(forked: &Forked) -> String {
    let head = ["ID", "NAME", "PLATFORM", "PLACEMENT"].map(|title| (title, Column::Words));
    let rows = forked.vms.iter().map(|vm| {
        let platform = if vm.platform.is_empty() { "-" } else { vm.platform.as_str() };
        let placement = match vm.placement {
            Placement::Local => "local",
            Placement::Remote => "remote",
        };
        [vm.id.to_string(), vm.name.to_string(), platform.to_owned(), placement.to_owned()]
    });
    table(head, rows)
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use api::ForkedVm;

    #[test]
    fn each_copy_has_a_line() {
        let copy = |index, platform: &str, placement| ForkedVm {
            id: Uuid::from_u128(u128::from(index)),
            name: format!("web.{index}").into(),
            index,
            platform: platform.into(),
            placement,
        };
        let vms = vec![copy(1, "", Placement::Local), copy(2, "north", Placement::Remote)];
        let expected = "\
ID                                    NAME   PLATFORM  PLACEMENT
00000000-0000-0000-0000-000000000001  web.1  -         local
00000000-0000-0000-0000-000000000002  web.2  north     remote
";
        assert_eq!(list(&Forked { vms }), expected);
    }
}
