//! What a shell completes: commands and options, and for bash the names of guests, which the agent is asked for.

use std::sync::mpsc::channel;
use std::time::Duration;

use clap::CommandFactory;
use clap_complete::Shell;

use super::{Cli, print_bytes};
use crate::agent::api::{Answer, Failure, Request};
use crate::agent::client::{Agent, ask};

/// `casemate completion`.
pub fn script(shell: Shell) -> Result<u8, Failure> {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "casemate", &mut text);
    if shell == Shell::Bash {
        text.extend_from_slice(bash_guests().as_bytes());
    }
    print_bytes(&text)
}

/// The names of the guests here, one a line; none if the agent does not answer at once, or does not let who asks look.
pub fn guest_names(agent: &Agent) -> Result<u8, Failure> {
    let (sender, answer) = channel();
    let agent = agent.clone();
    // It ends with the process, wherever it waits.
    let asking = std::thread::Builder::new().spawn(move || {
        let _ = sender.send(ask(&agent, &Request::List {}, &mut |_| {}));
    });
    let mut names = String::new();
    if asking.is_ok()
        && let Ok(Ok(Answer::Guests { guests })) = answer.recv_timeout(DEADLINE)
    {
        for guest in guests {
            names.push_str(&guest.name);
            names.push('\n');
        }
    }
    print_bytes(names.as_bytes())
}

/// Behind the words of a command that wants a guest first, its name; elsewhere what clap has.
fn bash_guests() -> String {
    let mut commands = Vec::new();
    collect(&Cli::command(), "", &mut commands);
    let patterns: Vec<String> = commands
        .iter()
        .map(|words| format!("\"{words}\""))
        .collect();
    format!(
        r#"
_casemate_guests() {{
    local words="${{COMP_WORDS[*]:1:COMP_CWORD-1}}"
    case "$words" in
        {})
            if [[ "${{COMP_WORDS[COMP_CWORD]}}" != -* ]]; then
                COMPREPLY=($(compgen -W "$("${{COMP_WORDS[0]}}" guest-names 2>/dev/null)" -- "${{COMP_WORDS[COMP_CWORD]}}"))
                return
            fi
            ;;
    esac
    _casemate "$@"
}}
complete -F _casemate_guests -o bashdefault -o default casemate
"#,
        patterns.join("|")
    )
}

fn collect(command: &clap::Command, words: &str, found: &mut Vec<String>) {
    let first = command.get_positionals().next();
    let of_guests = first.is_some_and(|argument| argument.get_id() == "name");
    if of_guests && !KEPT.contains(&words) && !words.starts_with("broker") {
        found.push(words.to_owned());
    }
    for below in command.get_subcommands() {
        let words = format!("{words} {}", below.get_name());
        collect(below, words.trim_start(), found);
    }
}

/// These want a description that is kept.
const KEPT: [&str; 2] = ["vm start", "vm delete"];
const DEADLINE: Duration = Duration::from_millis(700);
