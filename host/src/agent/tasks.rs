//! Requests that take long: each is a task with an id, its progress, and its end, which anybody who may look can read
//! while it goes on and for some time afterwards. Whoever asked may hang up; the work goes on.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use casemate_policy::{Action, Actor, Timestamp};
use serde_json::Value;
use tokio::sync::watch;

use crate::agent::Agent;
use crate::agent::api::{Answer, Failure, Line, Request, TaskInfo, TaskState};
use crate::agent::authority::Caller;
use crate::agent::vmm_process::lock;

/// The tasks of one agent: those under way, and the last that ended.
#[derive(Default)]
pub struct Tasks {
    all: Mutex<VecDeque<Arc<Task>>>,
}

/// One request that takes long.
pub struct Task {
    id: String,
    operation: &'static str,
    asker: Caller,
    begun: Timestamp,
    story: Mutex<Story>,
    /// Changes whenever the story does.
    changed: watch::Sender<u64>,
}

struct Story {
    guest: Option<String>,
    /// The last events, at most [`MAX_EVENTS`].
    events: VecDeque<Value>,
    /// How many there were before those.
    forgotten: u64,
    end: Option<Result<Answer, Failure>>,
}

/// How far somebody has read a task's story.
pub struct Reader {
    task: Arc<Task>,
    next: u64,
    ended: bool,
    changes: watch::Receiver<u64>,
}

impl Tasks {
    /// A new task; none if too many are under way.
    pub fn begin(
        &self,
        operation: &'static str,
        asker: &Caller,
        guest: Option<&str>,
    ) -> Result<Arc<Task>, Failure> {
        let mut all = lock(&self.all);
        if all.iter().filter(|task| task.runs()).count() >= MAX_RUNNING {
            return Err(Failure::new(
                "BUSY",
                format!("{MAX_RUNNING} tasks are under way; wait for one to end"),
            ));
        }
        while all.len() >= MAX_KEPT {
            let ended = all.iter().rposition(|task| !task.runs());
            ended.and_then(|oldest| all.remove(oldest));
        }
        let task = Arc::new(Task {
            id: random_id()?,
            operation,
            asker: asker.clone(),
            begun: Timestamp::of(SystemTime::now()),
            story: Mutex::new(Story {
                guest: guest.map(str::to_owned),
                events: VecDeque::new(),
                forgotten: 0,
                end: None,
            }),
            changed: watch::Sender::new(0),
        });
        all.push_front(Arc::clone(&task));
        Ok(task)
    }

    /// The newest first.
    pub fn infos(&self) -> Vec<TaskInfo> {
        lock(&self.all).iter().map(|task| task.info()).collect()
    }

    /// How many are under way.
    pub fn running(&self) -> usize {
        lock(&self.all).iter().filter(|task| task.runs()).count()
    }

    /// The task with this id.
    pub fn find(&self, id: &str) -> Result<Arc<Task>, Failure> {
        let found = lock(&self.all).iter().find(|task| task.id == id).cloned();
        found.ok_or_else(|| {
            Failure::new(
                "NO_SUCH_TASK",
                format!("no task {id:?}; see `casemate task list`"),
            )
        })
    }
}

impl Task {
    /// Adds an event. Of many the first are forgotten.
    pub fn say(&self, event: Value) {
        let mut story = lock(&self.story);
        if story.events.len() == MAX_EVENTS {
            story.events.pop_front();
            story.forgotten += 1;
        }
        story.events.push_back(event);
        drop(story);
        self.changed.send_modify(|count| *count += 1);
    }

    /// Its end. Only the first counts.
    pub fn end(&self, end: Result<Answer, Failure>) {
        let mut story = lock(&self.story);
        if let Ok(Answer::Guest(guest)) = &end {
            story.guest = Some(guest.name.clone());
        }
        story.end.get_or_insert(end);
        drop(story);
        self.changed.send_modify(|count| *count += 1);
    }

    /// What is known of it.
    pub fn info(&self) -> TaskInfo {
        let story = lock(&self.story);
        let (state, answer, failure) = match &story.end {
            None => (TaskState::Running, None, None),
            Some(Ok(answer)) => (TaskState::Done, Some(Box::new(answer.clone())), None),
            Some(Err(failure)) => (TaskState::Failed, None, Some(failure.clone())),
        };
        TaskInfo {
            id: self.id.clone(),
            operation: self.operation.to_owned(),
            guest: story.guest.clone(),
            asked_by: self.asker.name().to_owned(),
            begun: self.begun.to_string(),
            state,
            events: story.forgotten + story.events.len() as u64,
            last_event: story.events.back().cloned(),
            answer,
            failure,
        }
    }

    /// From the first event that is still known.
    pub fn read(self: Arc<Self>) -> Reader {
        let changes = self.changed.subscribe();
        Reader {
            task: self,
            next: 0,
            ended: false,
            changes,
        }
    }

    fn runs(&self) -> bool {
        lock(&self.story).end.is_none()
    }

    fn guest(&self) -> String {
        lock(&self.story).guest.clone().unwrap_or_default()
    }

    fn asked_by(&self, actor: &Actor) -> bool {
        self.asker.actor() == actor
    }
}

impl Reader {
    /// The next line; none behind the last. Waits for it.
    pub async fn next(&mut self) -> Option<Line> {
        loop {
            if self.ended {
                return None;
            }
            self.changes.borrow_and_update();
            if let Some(line) = self.take() {
                return Some(line);
            }
            self.changes.changed().await.ok()?;
        }
    }

    fn take(&mut self) -> Option<Line> {
        let story = lock(&self.task.story);
        self.next = self.next.max(story.forgotten);
        let behind = usize::try_from(self.next - story.forgotten).ok()?;
        if let Some(event) = story.events.get(behind) {
            self.next += 1;
            return Some(Line::Progress {
                event: event.clone(),
            });
        }
        let end = story.end.clone()?;
        self.ended = true;
        Some(match end {
            Ok(answer) => Line::Answer {
                answer: Box::new(answer),
            },
            Err(failure) => Line::Failed(failure),
        })
    }
}

impl Agent {
    /// A task that the caller may look at: an own one, or one of a guest that the caller may see.
    pub(super) fn task_of(&self, caller: &Caller, id: &str) -> Result<Arc<Task>, Failure> {
        let task = self.tasks.find(id)?;
        if !task.asked_by(caller.actor()) {
            self.decide(caller, &task.guest(), &Action::Status)?;
        }
        Ok(task)
    }

    /// `casemate task cancel`.
    pub(super) fn cancel_task(&self, caller: &Caller, id: &str) -> Result<Answer, Failure> {
        let task = self.tasks.find(id)?;
        let guest = task.guest();
        self.decide(caller, &guest, &Action::Cancel)?;
        if !task.runs() {
            return Err(not_cancellable(id, "has ended already"));
        }
        match task.operation {
            MIGRATE | ASSESS => self.cancel(&guest)?,
            _ => return Err(not_cancellable(id, "cannot be cancelled; let it end")),
        };
        Ok(Answer::Task(task.info()))
    }
}

impl Request {
    /// The guest that a task is about, where the request names it.
    pub(super) fn guest(&self) -> Option<&str> {
        match self {
            Self::Migrate { name, .. }
            | Self::Assess { name, .. }
            | Self::Start { name, .. }
            | Self::Upgrade { name } => Some(name),
            _ => None,
        }
    }
}

fn not_cancellable(id: &str, why: &str) -> Failure {
    Failure::new("NOT_CANCELLABLE", format!("task {id} {why}"))
}

fn random_id() -> Result<String, Failure> {
    use ring::rand::SecureRandom as _;
    let mut id = [0u8; 8];
    ring::rand::SystemRandom::new()
        .fill(&mut id)
        .map_err(|_| Failure::new("RANDOM", "the kernel gives no random bytes"))?;
    Ok(hex::encode(id))
}

/// The operations whose tasks can be cancelled.
const MIGRATE: &str = "migrate";
const ASSESS: &str = "assess";
/// Most tasks under way at a time.
const MAX_RUNNING: usize = 32;
/// Most tasks known at a time, ended ones included.
const MAX_KEPT: usize = 128;
/// Most events kept of one task.
const MAX_EVENTS: usize = 512;

#[cfg(test)]
mod tests {
    use super::*;

    fn someone() -> Caller {
        Caller::peer("someone")
    }

    #[tokio::test]
    async fn a_reader_hears_what_was_said_before_and_after_it_came_and_the_end_once() {
        let task = Tasks::default().begin("run", &someone(), None).unwrap();
        task.say(1.into());
        let mut reader = Arc::clone(&task).read();
        let more = Arc::clone(&task);
        let later = tokio::spawn(async move {
            tokio::task::yield_now().await;
            more.say(2.into());
            more.end(Err(Failure::new("A", "b")));
            more.end(Ok(Answer::Done));
        });
        let mut heard = Vec::new();
        while let Some(line) = reader.next().await {
            heard.push(serde_json::to_string(&line).unwrap());
        }
        later.await.unwrap();
        assert_eq!(
            heard,
            [
                r#"{"line":"progress","event":1}"#,
                r#"{"line":"progress","event":2}"#,
                r#"{"line":"failed","code":"A","error":"b"}"#,
            ]
        );
        assert_eq!(task.info().state, TaskState::Failed);
    }

    #[tokio::test]
    async fn of_many_events_the_last_are_kept_and_counted() {
        let task = Tasks::default().begin("run", &someone(), None).unwrap();
        for number in 0..MAX_EVENTS + 10 {
            task.say(number.into());
        }
        assert_eq!(task.info().events, MAX_EVENTS as u64 + 10);
        let first = Arc::clone(&task).read().next().await.unwrap();
        assert!(matches!(first, Line::Progress { event } if event == 10));
    }

    #[test]
    fn tasks_are_bounded_and_those_under_way_are_never_forgotten() {
        let tasks = Tasks::default();
        let mut running: Vec<_> = (0..MAX_RUNNING)
            .map(|_| tasks.begin("run", &someone(), None).unwrap())
            .collect();
        assert_eq!(
            tasks.begin("run", &someone(), None).err().unwrap().code,
            "BUSY"
        );
        let last = running.pop().unwrap();
        last.end(Ok(Answer::Done));
        for _ in 0..MAX_KEPT * 2 {
            tasks
                .begin("run", &someone(), None)
                .unwrap()
                .end(Ok(Answer::Done));
        }
        assert_eq!(tasks.infos().len(), MAX_KEPT);
        assert_eq!(tasks.running(), MAX_RUNNING - 1);
        for task in running {
            assert!(tasks.find(&task.id).is_ok());
        }
        assert_eq!(tasks.find(&last.id).err().unwrap().code, "NO_SUCH_TASK");
    }
}
