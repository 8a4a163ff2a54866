//! `vmfork watch`: a line for each fork that this VM comes out of.

use std::process::ExitCode;

use vmfork::{Via, Watch, WatchError};

use super::{CommandError, print, print_json};

/// Goes on until `count` lines are printed, or without an end.
pub(crate) fn run(json: bool, count: Option<u64>, via: Option<Via>) -> Result<ExitCode, CommandError> {
    if let Some(via) = via.filter(|&via| via != Via::Device) {
        return Err(CommandError::NoNotices { via });
    }
    let watch = Watch::open().map_err(WatchError::Open).map_err(CommandError::Watch)?;
    let mut left = count;
    while left != Some(0) {
        let notice = watch.next().map_err(CommandError::Watch)?;
        if json {
            print_json(&notice)?
        } else {
            print(&notice.to_string())?
        }
        left = left.map(|left| left - 1);
    }
    Ok(ExitCode::SUCCESS)
}
