//! `casemate doctor`: what this host can and cannot do, and how to mend it.
