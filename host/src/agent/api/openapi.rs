//! The API's description (OpenAPI 3.1), made from the routes and the types.

use schemars::generate::{SchemaGenerator, SchemaSettings};
use serde_json::{Map, Value, json};

use super::problem::{PROBLEM, Problem};
use super::routes::{Manner, OPENAPI_PATH, ROUTES, Route, TAG, field_of};
use super::{Answer, Line, Request};

/// The whole document.
pub fn document() -> Value {
    let settings = SchemaSettings::draft2020_12();
    let mut types = settings
        .with(|s| s.definitions_path = SCHEMAS.into())
        .into_generator();
    let requests = variants::<Request>(&mut types, "Request");
    let answers = variants::<Answer>(&mut types, "Answer");
    types.subschema_for::<Answer>();
    types.subschema_for::<Line>();
    types.subschema_for::<Problem>();
    let mut paths = Map::new();
    for route in ROUTES {
        let request = variant(&requests, TAG, route.operation);
        let answer = variant(&answers, "kind", route.answers);
        let at = paths.entry(route.path).or_insert_with(|| json!({}));
        if let Value::Object(methods) = at {
            let described = operation(route, &request, &answer);
            methods.insert(route.method.to_lowercase(), described);
        }
    }
    paths.insert(OPENAPI_PATH.to_owned(), this_document());
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Casemate's agent",
            "version": "1",
            "description": ABOUT,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {"schemas": types.take_definitions(true)},
    })
}

/// The members of an enum's schema, which itself is not published where `keep` says so.
fn variants<T: schemars::JsonSchema>(types: &mut SchemaGenerator, name: &str) -> Vec<Value> {
    types.subschema_for::<T>();
    let found = match name {
        // Paths and bodies say the same in HTTP's words.
        "Request" => types.definitions_mut().remove(name),
        _ => types.definitions().get(name).cloned(),
    };
    let members = found.as_ref().and_then(|schema| schema.get("oneOf"));
    members
        .and_then(Value::as_array)
        .cloned()
        .unwrap_or_default()
}

/// The member that this tag names; what is missing here a test finds.
fn variant(all: &[Value], tag: &str, name: &str) -> Value {
    let fits = |member: &&Value| {
        let tag = member.get("properties").and_then(|all| all.get(tag));
        tag.and_then(|tag| tag.get("const")) == Some(&Value::from(name))
    };
    all.iter().find(fits).cloned().unwrap_or_default()
}

fn operation(route: &Route, request: &Value, answer: &Value) -> Value {
    let in_path = |field: &str| route.path.split('/').any(|p| field_of(p) == Some(field));
    let required = |field: &str| {
        let all = request["required"].as_array();
        all.is_some_and(|all| all.iter().any(|one| one == field))
    };
    let (mut parameters, mut body, mut needed) = (Vec::new(), Map::new(), Vec::new());
    let fields = request["properties"].as_object().into_iter().flatten();
    for (field, schema) in fields.filter(|(field, _)| *field != TAG) {
        let place = match (in_path(field), route.method) {
            (true, _) => "path",
            (false, "GET") => "query",
            _ => {
                body.insert(field.clone(), schema.clone());
                needed.extend(required(field).then(|| field.clone()));
                continue;
            }
        };
        parameters.push(json!({
            "name": field, "in": place, "required": required(field), "schema": schema,
        }));
    }
    let described = json!({
        "operationId": route.operation,
        "summary": request["description"],
        "parameters": parameters,
        "responses": responses(route, answer),
    });
    if body.is_empty() {
        return described;
    }
    with_body(
        described,
        json!({
            "required": !needed.is_empty(),
            "content": {"application/json": {"schema": {
                "type": "object",
                "properties": body,
                "required": needed,
                "additionalProperties": false,
            }}},
        }),
    )
}

fn with_body(mut operation: Value, body: Value) -> Value {
    if let Some(fields) = operation.as_object_mut() {
        fields.insert("requestBody".to_owned(), body);
    }
    operation
}

fn responses(route: &Route, answer: &Value) -> Value {
    let line = json!({"$ref": format!("#{SCHEMAS}/Line")});
    let content = |kind: &str, schema: &Value| json!({kind: {"schema": schema}});
    let (status, text, content) = match route.manner {
        Manner::Now => ("200", "Done.", content("application/json", answer)),
        Manner::Task => (
            "202",
            "A task does it; its events end with this operation's answer.",
            content(
                "application/json",
                &json!({"$ref": format!("#{SCHEMAS}/Answer")}),
            ),
        ),
        Manner::Lines => (
            "200",
            "One JSON object a line, until the task's answer or failure.",
            content("application/x-ndjson", &line),
        ),
        Manner::Text => (
            "200",
            "Prometheus' text format.",
            content("text/plain", &json!({"type": "string"})),
        ),
    };
    let problem = json!({"$ref": format!("#{SCHEMAS}/Problem")});
    json!({
        status: {"description": text, "content": content},
        "default": {
            "description": "Refused or failed; the code is stable.",
            "content": {PROBLEM: {"schema": problem}},
        },
    })
}

fn this_document() -> Value {
    json!({"get": {
        "operationId": "openapi",
        "summary": "This document.",
        "parameters": [],
        "responses": {"200": {
            "description": "Done.",
            "content": {"application/json": {"schema": {"type": "object"}}},
        }},
    }})
}

const SCHEMAS: &str = "/components/schemas";
const ABOUT: &str = "HTTP/1.1 and JSON over the agent's Unix socket, where the kernel says who asks, and, where [api] is \
    configured, over TLS 1.3 with client certificates. The host's policy decides each request. A request that takes long \
    is answered with 202 and a task; the task goes on if its client hangs up. Fields that are not described are refused.";

#[cfg(test)]
mod tests {
    use super::*;

    /// `casemate openapi > host/openapi.json` renews it.
    #[test]
    fn the_published_document_is_this_one() {
        let published = include_str!("../../../openapi.json");
        let published: Value = serde_json::from_str(published).unwrap();
        assert!(
            published == document(),
            "run `casemate openapi > host/openapi.json`"
        );
    }

    #[test]
    fn every_route_is_described_and_every_reference_leads_somewhere() {
        let document = document();
        for route in ROUTES {
            let found = &document["paths"][route.path][route.method.to_lowercase()];
            let summary = found["summary"].as_str().unwrap();
            assert!(!summary.is_empty(), "{}", route.operation);
            if route.manner == Manner::Now {
                let schema = &found["responses"]["200"]["content"]["application/json"]["schema"];
                assert_eq!(schema["properties"]["kind"]["const"], route.answers);
            }
            for part in route.path.split('/').filter_map(field_of) {
                let parameters = found["parameters"].as_array().unwrap();
                let named = |p: &&Value| p["name"] == part && p["in"] == "path";
                assert_eq!(parameters.iter().filter(named).count(), 1, "{part}");
            }
        }
        let mut references = Vec::new();
        collect(&document, &mut references);
        assert!(references.len() > 20);
        for reference in references {
            let at = reference.strip_prefix('#').unwrap();
            assert!(document.pointer(at).is_some(), "{reference}");
        }
    }

    fn collect(value: &Value, into: &mut Vec<String>) {
        match value {
            Value::Object(members) => {
                let reference = members.get("$ref").and_then(Value::as_str);
                into.extend(reference.map(str::to_owned));
                members.values().for_each(|value| collect(value, into));
            }
            Value::Array(items) => items.iter().for_each(|value| collect(value, into)),
            _ => {}
        }
    }
}
