//! What a kernel is configured with: fragments of its `.config`, in the same form.

use std::collections::BTreeMap;
use std::fmt;

/// Why a configuration is not what was asked for.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A line is neither a setting nor a comment.
    #[error("line {number} of a kernel's configuration makes no sense: {line:?}")]
    Line {
        /// Its number, from 1 on.
        number: usize,
        /// The line.
        line: String,
    },
    /// The kernel has no such option, or another one that it depends on is not set.
    #[error("the kernel is not configured as asked: {}", list(differences))]
    NotAsAsked {
        /// The options that are otherwise.
        differences: Vec<Difference>,
    },
}

/// An option that is not as it was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// Its name, with `CONFIG_`.
    pub option: String,
    /// What was asked for.
    pub asked: String,
    /// What it is.
    pub found: String,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} is {}, not {}", self.option, self.found, self.asked)
    }
}

fn list(differences: &[Difference]) -> String {
    differences.iter().map(Difference::to_string).collect::<Vec<_>>().join(", ")
}

/// Options with their values. One that is not set has the value `n`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Config(BTreeMap<String, String>);

impl Config {
    /// Reads a fragment, or a whole `.config`. Of several lines about the same option, the last one counts.
    pub(super) fn parse(text: &str) -> Result<Self, Error> {
        let mut options = BTreeMap::new();
        for (number, line) in (1..).zip(text.lines()) {
            let unset = line.strip_prefix("# ").and_then(|rest| rest.strip_suffix(" is not set"));
            let setting = unset.map(|option| (option, "n")).or_else(|| line.split_once('='));
            match setting {
                Some((option, value)) if option.starts_with("CONFIG_") => {
                    options.insert(option.to_owned(), value.to_owned());
                }
                _ if line.is_empty() || line.starts_with('#') => {}
                _ => return Err(Error::Line { number, line: line.into() }),
            }
        }
        Ok(Self(options))
    }

    /// These options, and those of `other`, which win.
    pub(super) fn with(mut self, other: Self) -> Self {
        self.0.extend(other.0);
        self
    }

    /// Makes sure that each of these options is the same in `made`, which is the kernel's whole
    /// configuration.
    pub(super) fn check(&self, made: &Self) -> Result<(), Error> {
        let difference = |(option, asked): (&String, &String)| {
            let found = made.0.get(option).map_or("n", String::as_str);
            let difference =
                || Difference { option: option.clone(), asked: asked.clone(), found: found.to_owned() };
            (found != asked).then(difference)
        };
        let differences: Vec<_> = self.0.iter().filter_map(difference).collect();
        if differences.is_empty() { Ok(()) } else { Err(Error::NotAsAsked { differences }) }
    }
}

/// A fragment as the kernel reads it.
impl fmt::Display for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (option, value) in &self.0 {
            match value.as_str() {
                "n" => writeln!(f, "# {option} is not set")?,
                value => writeln!(f, "{option}={value}")?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FRAGMENT: &str =
        "# For guests.\nCONFIG_SMP=y\n\nCONFIG_NR_CPUS=16\n# CONFIG_MODVERSIONS is not set\n";

    #[test]
    fn fragments_are_read_and_written() {
        let config = Config::parse(FRAGMENT).unwrap();
        assert_eq!(config.to_string(), "# CONFIG_MODVERSIONS is not set\nCONFIG_NR_CPUS=16\nCONFIG_SMP=y\n");
        assert!(matches!(Config::parse("CONFIG_SMP=y\nSMP y"), Err(Error::Line { number: 2, .. })));
    }

    #[test]
    fn later_fragments_win() {
        let both = Config::parse(FRAGMENT).unwrap().with(Config::parse("# CONFIG_SMP is not set").unwrap());
        assert_eq!(
            both.to_string(),
            "# CONFIG_MODVERSIONS is not set\nCONFIG_NR_CPUS=16\n# CONFIG_SMP is not set\n"
        );
    }

    #[test]
    fn options_that_the_kernel_did_not_take_are_named() {
        let asked = Config::parse(FRAGMENT).unwrap();
        asked.check(&Config::parse("CONFIG_SMP=y\nCONFIG_NR_CPUS=16\nCONFIG_OTHER=y\n").unwrap()).unwrap();
        let made = Config::parse("CONFIG_NR_CPUS=8\nCONFIG_SMP=y\nCONFIG_MODVERSIONS=y\n").unwrap();
        let message = asked.check(&made).unwrap_err().to_string();
        assert!(
            message.ends_with(": CONFIG_MODVERSIONS is y, not n, CONFIG_NR_CPUS is 8, not 16"),
            "{message}"
        );
    }
}
