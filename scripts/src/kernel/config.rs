// SPDX-License-Identifier: GPL-2.0-only

//! Kernel configurations, and fragments of them.

use std::collections::BTreeMap;

/// Symbols and their values. One that is not set has the value `n`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Config(BTreeMap<String, String>);

impl Config {
    /// Reads `.config`, `auto.conf` or a fragment. Of two lines about one symbol, the later counts.
    pub fn parse(text: &str) -> Config {
        Config(text.lines().filter_map(parse_line).collect())
    }

    /// The value of `symbol`, quotes and all; none if it is not mentioned.
    pub fn get(&self, symbol: &str) -> Option<&str> {
        self.0.get(symbol).map(String::as_str)
    }

    /// The file for `KCONFIG_ALLCONFIG`.
    pub fn text(&self) -> String {
        self.0
            .iter()
            .map(|(symbol, value)| match value.as_str() {
                "n" => format!("# {symbol} is not set\n"),
                _ => format!("{symbol}={value}\n"),
            })
            .collect()
    }

    /// What we asked for and did not get in `result`: a symbol that a kernel no longer has, or whose
    /// dependencies are not met, vanishes without a word.
    pub fn unmet(&self, result: &Config) -> Vec<String> {
        self.0
            .iter()
            .filter_map(|(symbol, wanted)| {
                let got = result.get(symbol).unwrap_or("n");
                (got != wanted).then(|| match result.get(symbol) {
                    Some(_) => format!("{symbol}={wanted} is {got}"),
                    None => format!("{symbol}={wanted} is not there: a dependency is not met, or there is no such symbol"),
                })
            })
            .collect()
    }
}

fn parse_line(line: &str) -> Option<(String, String)> {
    let line = line.trim();
    if let Some(symbol) = line
        .strip_prefix("# ")
        .and_then(|rest| rest.strip_suffix(" is not set"))
    {
        return Some((symbol.to_string(), "n".to_string()));
    }
    let (symbol, value) = line.split_once('=')?;
    symbol
        .starts_with("CONFIG_")
        .then(|| (symbol.to_string(), value.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn later_lines_count() {
        let config =
            Config::parse("CONFIG_A=y\n# a comment=1\nCONFIG_B=\"x y\"\n# CONFIG_A is not set\n");
        assert_eq!(config.get("CONFIG_A"), Some("n"));
        assert_eq!(config.get("CONFIG_B"), Some("\"x y\""));
        assert_eq!(config.get("CONFIG_C"), None);
        assert_eq!(Config::parse(&config.text()), config);
    }

    #[test]
    fn what_was_not_granted_is_named() {
        let wanted = Config::parse(
            "CONFIG_A=y\nCONFIG_B=m\nCONFIG_C=y\n# CONFIG_D is not set\nCONFIG_E=n\n",
        );
        let result = Config::parse("CONFIG_A=y\nCONFIG_B=y\n# CONFIG_E is not set\n");
        let unmet = wanted.unmet(&result);
        assert_eq!(unmet.len(), 2, "{unmet:?}");
        assert_eq!(unmet[0], "CONFIG_B=m is y");
        assert!(unmet[1].starts_with("CONFIG_C=y is not there"));
    }
}
