//! Paths in an image: relative, and below `usr` what Debian has merged into it.

/// The directories of the root that are links into `usr`.
pub(crate) const MERGED: [&str; 4] = ["bin", "lib", "lib64", "sbin"];

/// The path in the image of what a package calls `path`: without a leading slash, `bin/x` as `usr/bin/x`.
pub(crate) fn normalise(path: &str) -> String {
    let parts: Vec<_> = path.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
    let merged = parts.len() > 1 && MERGED.contains(&parts[0]);
    if merged { format!("usr/{}", parts.join("/")) } else { parts.join("/") }
}

/// What a link of a package has to point to in the image. A relative target would lead elsewhere from a link
/// that [`normalise`] moves one level down, so there it is made absolute.
pub(crate) fn link_target(link: &str, target: &str) -> String {
    let moved = normalise(link) != link;
    if !moved || target.starts_with('/') {
        return target.to_owned();
    }
    let mut parts: Vec<_> = link.split('/').collect();
    parts.pop();
    for part in target.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            _ => parts.push(part),
        }
    }
    format!("/{}", parts.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merged_directories_are_in_usr() {
        assert_eq!(normalise("/bin/busybox"), "usr/bin/busybox");
        assert_eq!(normalise("lib/x86_64-linux-gnu/libc.so.6"), "usr/lib/x86_64-linux-gnu/libc.so.6");
        assert_eq!(normalise("./lib64/ld-linux-x86-64.so.2"), "usr/lib64/ld-linux-x86-64.so.2");
        assert_eq!(normalise("/usr/bin/env"), "usr/bin/env");
        assert_eq!(normalise("/library/x"), "library/x");
        assert_eq!(normalise("/lib"), "lib");
    }

    #[test]
    fn links_lead_where_they_led() {
        assert_eq!(
            link_target("lib/x86_64-linux-gnu/libz.so.1", "libz.so.1.2.13"),
            "/lib/x86_64-linux-gnu/libz.so.1.2.13"
        );
        assert_eq!(link_target("lib/x86_64-linux-gnu/liba.so", "../../usr/lib/liba.so"), "/usr/lib/liba.so");
        assert_eq!(link_target("lib64/ld-linux-x86-64.so.2", "/lib/ld-2.36.so"), "/lib/ld-2.36.so");
        assert_eq!(link_target("usr/bin/python3", "python3.11"), "python3.11");
    }
}
